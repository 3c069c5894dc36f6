"""Named sets of values for train_countdown.py: `--preset NAME`; flags override them.

    python train_countdown.py --preset gpu-24gb --out runs/qwen1.5b
    python -m machinery.memory --preset gpu-24gb                    # what that needs, line by line

Memory is memory.py's estimate of the peak on the device. Of the GPU presets no run has been timed.
"""

PRESETS = {
    # 1 GiB, 4 minutes on 2 CPU cores: the defaults of train_countdown.Config, in fp32
    "laptop": {},

    # 1.5B parameters, all of them trained: 12 GiB on the GPU and 18 GiB of host memory; time not measured.
    # --model Qwen/Qwen2.5-3B --lora-rank 16 --slots 64 --learning-rate 1e-4 trains adapters of 3B in 10 GiB.
    "gpu-24gb": dict(
        model="Qwen/Qwen2.5-1.5B", style="base", level="tinyzero", device="cuda", dtype="bfloat16",
        steps=200, batch_size=256, group_size=8, max_new_tokens=1024, slots=128,
        learning_rate=1e-6, warmup_steps=10, kl_coef=0.0, weights="format=0.1",
        micro_batch_tokens=8192, activation_checkpointing=True, offload_optimizer=True,
        eval_every=20, eval_n=512, save_every=20),
}
# 3B parameters, all of them trained, optimizer on the GPU: 57 GiB; time not measured.
PRESETS["gpu-80gb"] = PRESETS["gpu-24gb"] | dict(
    model="Qwen/Qwen2.5-3B", batch_size=512, group_size=16, slots=256, micro_batch_tokens=16384,
    offload_optimizer=False)
