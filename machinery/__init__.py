"""What the scripts stand on and a first reading skips.

    flags.py         the command line from a dataclass, errors of one line, Ctrl-C
    run_folder.py    run folders, their logs and checkpoints, resuming
    rl_run.py        what a reinforcement learning run carries from step to step
    rollouts.py      every completion with its reward and advantage, written down and shown
    checkpoints.py   Hugging Face directories, on disk and on the hub: load, save
    batching.py      token lists -> padded batches -> log-probs
    optimizer.py     AdamW on fp32 master weights
    lora.py          adapters on a frozen model
    cuda_graphs.py   decoding on a GPU
    distributed.py   several processes
    memory.py        what a run needs, before it starts
    presets.py       named sets of flags
    stages.py        commands one after the other, those that are done skipped
    plots.py         every picture
"""
