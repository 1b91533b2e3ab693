"""Private folders below /tmp, where any user may be the first to create a folder with a predictable name.

Code and data cached there are executed or trained on later, so a folder is used only if this user owns it and no other
user can write to it. launch/env.sh does the same in bash.
"""

import hashlib
import os
import stat
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from mythos_dist.errors import UserError

# The caches of compilers; launch/env.sh sets them to folders below `compile_caches()`.
CACHES = ("TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR")


def compile_caches(environment: Mapping[str, str] | None = None) -> Path:
    """This user's folder for compiled code on the node's own disk."""
    env = os.environ if environment is None else environment
    return Path(env.get("TMPDIR") or "/tmp", f"mythos_dist-{os.getuid()}")


def default_shard_cache() -> Path:
    """This user's folder for decompressed shards, if `data.cache` is not set."""
    return Path(tempfile.gettempdir(), f"mythos-shards-{os.getuid()}")


def why_untrusted(folder: Path) -> str:
    """Why `folder` must not be used; empty if it may be, or if it does not exist."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{folder} cannot be checked ({error.strerror})"
    if stat.S_ISLNK(status.st_mode):
        return f"{folder} is a symbolic link"
    if not stat.S_ISDIR(status.st_mode):
        return f"{folder} is not a folder"
    if status.st_uid != os.getuid():
        return f"{folder} belongs to user {status.st_uid}, but you are user {os.getuid()}"
    if status.st_mode & 0o022:
        return f"{folder} has mode {stat.S_IMODE(status.st_mode):04o}: other users can write to it"
    return ""


def make_private_folder(folder: Path, remedy: str) -> Path:
    """The folder, created with mode 0700 if it does not exist.

    Raises UserError with `remedy` if another user owns it or can write to it, or if it is a link. The mode of an
    existing folder is not changed: files that other users have put there would be used.
    """
    try:
        folder.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        pass  # by this user or another one: checked below
    except OSError as error:
        raise UserError(f"{folder} cannot be created ({error.strerror}); {remedy}") from None
    if problem := why_untrusted(folder):
        raise UserError(f"{problem}; check and remove it, or {remedy}")
    return folder


def scratch_folder(url: str, scratch: str | Path | None, kind: str) -> Path:
    """The folder for unfinished work of a `kind` on `url`, in `scratch`; None: below the system's temporary folder."""
    base = Path(scratch) if scratch else make_private_folder(default_shard_cache(), "name a folder with --scratch")
    return base / kind / hashlib.sha256(url.encode()).hexdigest()[:16]


def check_compile_caches(compiles: bool = False, environment: MutableMapping[str, str] = os.environ) -> None:
    """Check on every node that cache variables point only to private folders. Raises UserError.

    compiles: torch.compile is used, whose default cache is a folder that any user can create.
    """
    if compiles:
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compile_caches(environment) / "inductor"))
    name = compile_caches(environment).name  # the launch script may have run with another TMPDIR
    parents = {
        folder for cache in CACHES for folder in Path(environment.get(cache) or "/").parents if folder.name == name
    }
    for folder in sorted(parents):
        make_private_folder(folder, f"set {', '.join(CACHES)} to folders of yours")
