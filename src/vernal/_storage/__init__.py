"""What is written and read: files, histories, checkpoints.

`save` and `history` write one file, by `file`, `npy` and `atomic`. `checkpointer` is
what a fit calls: it has claimed a `checkpoint_directory`, where `checkpoint_store`
writes through Orbax and `history_log` appends rows. `snapshot` lists what of a trainer
is kept, `positions` finds where in another one its rules and parameters are. `origin`
has checksums of the rest.
"""

from .checkpointer import Checkpointer, open_checkpointer
from .checkpoints import Checkpoints
from .file import DamagedFileError, ForeignFileError, NewerFormatError
from .history import History, Recorder
from .origin import origin
from .save import load, save
