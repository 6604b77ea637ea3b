"""Arrays in NumPy's `.npy` format, as uncompressed members of a zip archive.

They are read where they lie, each straight into its own memory. Nothing is believed
before it is checked, nothing is evaluated, and no more is allocated than the file has.
"""

import math
import re
import struct
import zipfile
import zlib
from io import BufferedReader
from typing import IO, NamedTuple

import numpy as np

# The flag of a name in UTF-8: the only one that an uncompressed member has.
_UTF8 = 0x800

_LOCAL_HEADER = 30
_MAGIC = b"\x93NUMPY\x01\x00"
_DESCRIBED = re.compile(
    rb"\{'descr': '([<>|=][a-zA-Z]\d*(?:\[\w+\])?)', "
    rb"'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \} *\n"
)
# The description of an array of 64 dimensions is shorter.
_LONGEST = 4096

# JAX takes over memory that is aligned so, and copies other memory.
_ALIGNMENT = 64


class Member(NamedTuple):
    """Where in a file the bytes of a member are."""

    start: int
    size: int
    crc: int


class Described(NamedTuple):
    """What the header of a `.npy` member says, and where its numbers are."""

    dtype: np.dtype
    shape: tuple[int, ...]
    is_fortran: bool
    numbers: Member
    """With the checksum that stands in the archive: that of the header and these."""
    crc: int
    """The checksum of the header alone."""


def directory(file: IO[bytes]) -> tuple[list[zipfile.ZipInfo], list[int]]:
    """Lists the members in the order in which they lie, and where each one must end."""
    with zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        end = archive.start_dir
    return entries, [*(entry.header_offset for entry in entries[1:]), end]


def located(file: IO[bytes], entry: zipfile.ZipInfo, end: int) -> Member:
    """Finds the bytes of a member, which must be uncompressed and fill its place."""
    name = entry.orig_filename
    encoded = name.encode("utf-8" if entry.flag_bits & _UTF8 else "cp437")
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & ~_UTF8:
        raise ValueError(f"its member {name!r} is compressed or encrypted")
    file.seek(max(entry.header_offset, 0))
    header = file.read(_LOCAL_HEADER + len(encoded))
    if header[:4] != b"PK\x03\x04" or header[_LOCAL_HEADER:] != encoded:
        raise ValueError(f"its member {name!r} is not where it should be")
    start = entry.header_offset + sum(struct.unpack("<HH", header[26:30]))
    start += _LOCAL_HEADER
    if entry.file_size != entry.compress_size or start + entry.file_size != end:
        raise ValueError(f"its member {name!r} has another size than its place")
    return Member(start, entry.file_size, entry.CRC)


def read_bytes(file: IO[bytes], member: Member) -> bytes:
    """Reads a whole member."""
    file.seek(member.start)
    data = file.read(member.size)
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        raise ValueError("a checksum is another")
    return data


def described(file: IO[bytes], member: Member) -> Described:
    """Reads what an array is, and checks that it has the size of its member."""
    file.seek(member.start)
    head = file.read(min(member.size, _LONGEST))
    begin = len(_MAGIC) + 2
    match = _DESCRIBED.match(head, begin)
    length = int.from_bytes(head[begin - 2 : begin], "little")
    if not head.startswith(_MAGIC) or not match or match.end() != begin + length:
        raise ValueError("an array is not described as it should be")
    descr, is_fortran, sides = match.groups()
    dtype = np.dtype(descr.decode())
    shape = tuple(int(side) for side in sides.split(b",") if side.strip())
    start, size = member.start + match.end(), member.size - match.end()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != size:
        raise ValueError("an array has another size than it says")
    numbers = Member(start, size, member.crc)
    is_fortran = is_fortran == b"True"
    return Described(dtype, shape, is_fortran, numbers, zlib.crc32(head[: match.end()]))


def read_array(file: BufferedReader, array: Described) -> np.ndarray:
    """Reads the numbers into memory of their own, which no one else has."""
    start, size, crc = array.numbers
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    skip = -memory.__array_interface__["data"][0] % _ALIGNMENT
    data = memory[skip : skip + size]
    file.seek(start)
    if file.readinto(data.data) != size or zlib.crc32(data.data, array.crc) != crc:
        raise ValueError("a checksum is another")
    sides = array.shape[::-1] if array.is_fortran else array.shape
    numbers = data.view(array.dtype).reshape(sides)
    return numbers.T if array.is_fortran else numbers


def write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Writes an array of a dtype that NumPy has."""
    is_fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    text = (
        f"{{'descr': {array.dtype.str!r}, 'fortran_order': {is_fortran}, "
        f"'shape': {array.shape}, }}"
    )
    begin = len(_MAGIC) + 2
    text += " " * (-(begin + len(text) + 1) % _ALIGNMENT) + "\n"
    flat = np.ascontiguousarray(array.T if is_fortran else array).reshape(-1)
    with archive.open(name, "w", force_zip64=True) as member:
        member.write(_MAGIC + struct.pack("<H", len(text)) + text.encode())
        if flat.nbytes:
            member.write(flat.view(np.uint8).data)
