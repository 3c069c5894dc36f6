"""A decoding step as one launch on a GPU: CUDA graphs, and a KV cache that nothing on the host moves.

The step of a model with 28 layers is some 900 kernels, and to launch them one by one takes longer than to run them.
"""

import torch

from model import KVCache


class StaticKVCache(KVCache):
    """A KVCache with nothing in a decoding step that depends on the host, as a CUDA graph needs it.

    The cursor that counts is the one on the device. The window is columns begin..stop, which the caller sets for many
    steps in advance, wider than what is in use: the mask hides the rest."""

    stop = 0

    def append(self, layer: int, keys, values):
        """Writes (B, K, 1, E) at the cursor and returns the window (B, K, stop - begin, E)."""
        self.keys[layer].index_copy_(2, self.cursor, keys)
        self.values[layer].index_copy_(2, self.cursor, values)
        return self.keys[layer, :, :, self.begin:self.stop], self.values[layer, :, :, self.begin:self.stop]

    def advance(self, columns: int) -> None:
        """Moves the cursor on the device alone: a replayed graph runs no Python, so `end` is the caller's to move."""
        self.cursor += columns


class Graphs:
    """Runs a decoding step as one launch. A CUDA graph repeats the same kernels on the same memory, so there is one for
    each shape. A shape's first step runs as it is, which also warms up what may not happen for the first time under
    capture. Without a GPU every step does."""

    def __init__(self, step, device):
        self.step, self.capture, self.graphs, self.pool = step, device.type == "cuda", {}, None

    def run(self, shape) -> None:
        if shape in self.graphs:
            self.graphs[shape].replay()
            return
        self.step()
        if self.capture:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self.step()  # recorded, not run
            self.pool, self.graphs[shape] = graph.pool(), graph
