"""Adapters uploaded to an API in tests."""

import io
import tarfile
from pathlib import Path
from typing import Any

import httpx2

from tests.support.adapters import Draft
from tests.support.api import Api


def tiny(folder: Path, seed: int = 1, **config: Any) -> Path:
    """A small right adapter; its bytes depend on `seed`."""
    return (
        Draft(rank=2, modules=("self_attn.q_proj",), layers=(0,), seed=seed)
        .having(**config)
        .write(folder)
    )


def tarred(folder: Path) -> bytes:
    """A folder as a .tar.gz."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, arcname=file.name)
    return packed.getvalue()


async def upload(
    api: Api, name: str | None, folder: Path, path: str = "/v1/adapters", **fields: str
) -> httpx2.Response:
    """POST a folder as an adapter."""
    headers = {"Authorization": fields.pop("authorization", "")}
    form = {**({} if name is None else {"name": name}), **fields}
    files = {"file": ("adapter.tar.gz", tarred(folder))}
    return await api.client.post(path, data=form, files=files, headers=headers)


async def added(api: Api, name: str, folder: Path, **fields: str) -> dict[str, Any]:
    """The version that an upload made, which must succeed."""
    response = await upload(api, name, folder, **fields)
    assert response.status_code == 201, response.text
    version: dict[str, Any] = response.json()
    return version
