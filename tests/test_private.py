"""Folders with predictable names in /tmp are used only if they belong to this user alone."""

import os
import socket

import pytest

from mythos_dist.errors import UserError
from mythos_dist.private import (
    check_compile_caches,
    compile_caches,
    default_shard_cache,
    make_private_folder,
    why_untrusted,
)


def test_a_private_folder_is_created_with_mode_0700(tmp_path):
    """Whatever the umask allows."""
    before = os.umask(0)
    try:
        folder = make_private_folder(tmp_path / "new", "set it")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert make_private_folder(folder, "set it") == folder


@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "socket", "mode 770", "mode 702", "another owner"])
def test_a_path_that_other_users_could_write_to_is_refused(kind, tmp_path, monkeypatch):
    """The error has the reason and a remedy; the path is not changed."""
    folder = tmp_path / "cache"
    if "link" in kind:
        folder.symlink_to(tmp_path if kind == "link" else tmp_path / "nowhere")
    elif kind == "file":
        folder.touch()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder))
    else:
        folder.mkdir()
        folder.chmod(int(kind[-3:], 8) if "mode" in kind else 0o700)
        if kind == "another owner":
            me = os.getuid()
            monkeypatch.setattr(os, "getuid", lambda: me + 1)
    before = folder.lstat().st_mode
    assert why_untrusted(folder)
    with pytest.raises(UserError, match=f"{folder} .*; check and remove it, or set data.cache"):
        make_private_folder(folder, "set data.cache")
    assert folder.lstat().st_mode == before


def test_compiler_caches_are_checked_if_variables_point_to_them(tmp_path):
    """Folders that the user has chosen are not checked."""
    env = {"TMPDIR": str(tmp_path)}
    folder = compile_caches(env)
    assert folder == tmp_path / f"mythos_dist-{os.getuid()}"
    folder.symlink_to(tmp_path)
    check_compile_caches(environment=env | {"TRITON_CACHE_DIR": str(tmp_path / "mine")})
    for name in ("TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        with pytest.raises(UserError, match="is a symbolic link"):
            check_compile_caches(environment=env | {name: str(folder / "x" / "y")})
    with pytest.raises(UserError, match="is a symbolic link"):
        check_compile_caches(compiles=True, environment=env)
    elsewhere = {"TMPDIR": "/nowhere", "TRITON_CACHE_DIR": str(folder / "triton")}  # from a launch on another host
    with pytest.raises(UserError, match="is a symbolic link"):
        check_compile_caches(environment=elsewhere)


def test_names_are_the_users():
    assert compile_caches({}).name.endswith(str(os.getuid())) and default_shard_cache().name.endswith(str(os.getuid()))
