"""What is written and read: files, histories, checkpoints."""

from .checkpointer import Keeper as Keeper
from .checkpoints import Checkpoints as Checkpoints
from .file import (
    DamagedFileError as DamagedFileError,
    ForeignFileError as ForeignFileError,
    NewerFormatError as NewerFormatError,
)
from .history import History as History
from .origin import origin as origin
from .recorder import Recorder as Recorder
from .save import load as load, save as save
