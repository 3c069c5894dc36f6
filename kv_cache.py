"""Keys and values of the tokens read so far, so that a new token costs one column of attention and not a whole pass.

Shapes: L layers, B rows, K key/value heads, S columns of the cache, W of them in use, T new tokens, E head dimension.
"""

import torch


class KVCache:
    """Keys and values of every layer, B rows, S columns. All rows write into the same column, whatever their lengths.

    Rows of different age share one cursor: the caller's mask says which columns belong to a row, and positions are the
    caller's too, so a row may begin at any column. Then appending a token is one slice copy, and attention reads one
    contiguous window.
    """

    def __init__(self, config, rows: int, columns: int, *, device=None, dtype=torch.float32):
        shape = (config.num_layers, rows, config.num_kv_heads, columns, config.head_dim)  # (L, B, K, S, E)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.begin = 0  # first column that any row uses
        self.end = 0    # the cursor: the next column to write
        self.cursor = torch.zeros(1, dtype=torch.long, device=device)  # the same number on the device

    def append(self, layer: int, keys, values):
        """Writes (B, K, T, E) at the cursor and returns the window (B, K, W, E) of all columns in use."""
        stop = self.end + keys.shape[2]
        self.keys[layer, :, :, self.end:stop] = keys
        self.values[layer, :, :, self.end:stop] = values
        return self.keys[layer, :, :, self.begin:stop], self.values[layer, :, :, self.begin:stop]

    @property
    def stop(self) -> int:
        """The end of the window that a single new token sees."""
        return self.end + 1

    def advance(self, columns: int) -> None:
        """Moves the cursor, once all layers have appended."""
        self.move_cursor(self.end + columns)

    def move_cursor(self, column: int) -> None:
        self.end = column
        self.cursor.fill_(column)

    def shrink(self, rows: int, holes: list[int], movers: list[int]) -> None:
        """Forgets all but the first `rows` rows, after rows `movers` were copied into rows `holes`. In place."""
        window = slice(self.begin, self.end)
        for tensor in (*self.keys, *self.values):  # (B, K, S, E)
            tensor[holes, :, window] = tensor[movers, :, window]
        self.keys, self.values = self.keys[:, :rows], self.values[:, :rows]

    def shift_left(self, columns: int) -> None:
        """Moves everything in use this many columns to the left, to make room at the right end. A layer at a time, so
        that there is never a second cache."""
        for tensor in (*self.keys, *self.values):
            tensor[:, :, :self.end - columns] = tensor[:, :, columns:self.end].clone()
        self.begin -= columns
        self.move_cursor(self.end - columns)


class StaticKVCache(KVCache):
    """The same with nothing in a decoding step that depends on the host, as a CUDA graph needs it.

    The cursor that counts is the one on the device. The window is columns begin..stop, which the caller sets for many
    steps in advance, wider than what is in use: the mask hides the rest.
    """

    stop = 0

    def append(self, layer: int, keys, values):
        """Writes (B, K, 1, E) at the cursor and returns the window (B, K, stop - begin, E)."""
        self.keys[layer].index_copy_(2, self.cursor, keys)
        self.values[layer].index_copy_(2, self.cursor, values)
        return self.keys[layer, :, :, self.begin:self.stop], self.values[layer, :, :, self.begin:self.stop]

    def advance(self, columns: int) -> None:
        """Moves the cursor on the device alone: a replayed graph runs no Python, so `end` is the caller's to move."""
        self.cursor += columns
