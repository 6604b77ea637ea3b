"""What is written and read: files, histories, checkpoints.

`save` and `history` write one file, by `file`, `npy` and `atomic`. `checkpointer` is
what a fit calls: it has claimed a `checkpoint_directory`, where `checkpoint_store`
writes through Orbax and `history_log` appends rows, and `checkpoint_search` finds what
is whole. `snapshot` lists what of a trainer is kept.
"""

from .checkpointer import (
    Checkpointer as Checkpointer,
    open_checkpointer as open_checkpointer,
)
from .checkpoints import Checkpoints as Checkpoints
from .file import (
    DamagedFileError as DamagedFileError,
    ForeignFileError as ForeignFileError,
    NewerFormatError as NewerFormatError,
)
from .history import History as History, Recorder as Recorder
from .origin import origin as origin
from .save import load as load, save as save
