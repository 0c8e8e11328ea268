"""What the operator asks with an admin key: load, point, split, roll back, unload; vLLM's two routes for its clients."""

from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse, Response

from lora_tune.adapter.shelf import look
from lora_tune.serving.answers import Serving
from lora_tune.serving.bodies import AliasBody, LoadBody, VllmLoadBody, VllmUnloadBody, dump
from lora_tune.serving.deployed import Deployed, Pointer
from lora_tune.serving.guard import log_event, needs_admin_key
from lora_tune.serving.routes import body_of, serving_of, takes

UNLOAD_SECONDS = 30.0
"""Longest wait for the requests that still use a version."""

router = APIRouter(dependencies=[Depends(needs_admin_key)], tags=["adapters"])


@router.get("/v1/adapters")
async def adapters(request: Request) -> Response:
    """List what is loaded, what every name means, and what the registry has."""
    serving = serving_of(request)
    listed = await serving.beside(partial(_listed, serving), pool=serving.looks)
    return Response(dump(listed), media_type="application/json")


@router.post("/v1/adapters", status_code=201, openapi_extra=takes(LoadBody))
async def load_adapter(request: Request) -> Response:
    """Load a version, proved by its probes; its name means it from then on, unless `point` is false."""
    body = await body_of(request, LoadBody)
    version = await _load(request, body.source, name=body.name, point=body.point)
    return Response(dump(_described(serving_of(request), version)), status_code=201, media_type="application/json")


@router.delete(
    "/v1/adapters/{id}", status_code=204, openapi_extra={"responses": {"204": {"description": "It is gone."}}}
)
async def unload_adapter(request: Request, id: str) -> Response:
    """Free a version that no alias points to, once no request uses it."""
    await _unload(request, id)
    return Response(status_code=204)


@router.put("/v1/aliases/{alias}", openapi_extra=takes(AliasBody))
async def point_alias(request: Request, alias: str) -> Response:
    """Let an alias mean a version, or a split between several, or run another version beside it."""
    body = await body_of(request, AliasBody)
    # Said to be null, a shadow ends; not said, it stays as it is.
    shadow = (body.shadow or "") if "shadow" in body.model_fields_set else None
    if shadow == "" and (body.target is not None or body.split is not None):
        shadow = None
    serving = serving_of(request)
    point = partial(serving.fleet.point, alias, target=body.target, split=body.split, shadow=shadow)
    pointer = await serving.beside(point, pool=serving.changes)
    return _pointed(request, "point", pointer)


@router.post("/v1/aliases/{alias}/rollback")
async def roll_back_alias(request: Request, alias: str) -> Response:
    """Let an alias mean what it meant before."""
    serving = serving_of(request)
    pointer = await serving.beside(partial(serving.fleet.rollback, alias), pool=serving.changes)
    return _pointed(request, "rollback", pointer)


@router.delete(
    "/v1/aliases/{alias}", status_code=204, openapi_extra={"responses": {"204": {"description": "It is gone."}}}
)
async def forget_alias(request: Request, alias: str) -> Response:
    """Take an alias away; what it pointed to stays loaded."""
    serving = serving_of(request)
    await serving.beside(partial(serving.fleet.forget, alias), pool=serving.changes)
    log_event("forget", id=request.state.request_id, alias=alias[:64])
    return Response(status_code=204)


@router.post("/v1/load_lora_adapter", openapi_extra=takes(VllmLoadBody))
async def vllm_load(request: Request) -> PlainTextResponse:
    """Load as vLLM's clients ask for it; the path is a registry's version or a folder inside its root."""
    body = await body_of(request, VllmLoadBody)
    version = await _load(request, body.lora_path, name=body.lora_name, point=True)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully as {version.id}.")


@router.post("/v1/unload_lora_adapter", openapi_extra=takes(VllmUnloadBody))
async def vllm_unload(request: Request) -> PlainTextResponse:
    """Unload every version of a name, and the name."""
    body = await body_of(request, VllmUnloadBody)
    await _unload(request, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _load(request: Request, source: str, *, name: str | None, point: bool) -> Deployed:
    serving = serving_of(request)
    load = partial(serving.fleet.load, source, name=name, point=point)
    version = await serving.beside(load, pool=serving.changes)
    log_event("load", id=request.state.request_id, version=version.id, verdict=version.verdict, pointed=point)
    return version


async def _unload(request: Request, id: str) -> None:
    serving = serving_of(request)
    await serving.beside(partial(serving.fleet.unload, id, timeout=UNLOAD_SECONDS), pool=serving.changes)
    log_event("unload", id=request.state.request_id, version=id[:256])


def _pointed(request: Request, event: str, pointer: Pointer) -> Response:
    shown = _shown(pointer)
    log_event(event, id=request.state.request_id, **shown)
    return Response(dump(shown), media_type="application/json")


def _shown(pointer: Pointer) -> dict[str, Any]:
    return {"alias": pointer.alias, "target": dict(pointer.target), "shadow": pointer.shadow}


def _described(serving: Serving, version: Deployed) -> dict[str, Any]:
    pointers = serving.fleet.pointers().values()
    return {
        "id": version.id,
        "name": version.name,
        "digest": version.digest,
        "verdict": version.verdict,
        "in_flight": serving.fleet.in_flight().get(version.id, 0),
        "loaded_at": version.loaded_at,
        "rank": version.files.shape.rank,
        "aliases": [pointer.alias for pointer in pointers if version.id in dict(pointer.target)],
    }


def _listed(serving: Serving) -> dict[str, Any]:
    """Return what is there; of the registry, versions whose content was checked when they arrived."""
    fleet = serving.fleet
    versions = fleet.versions()
    loaded = {version.digest for version in versions}
    shelf = look(fleet.registry)
    stored = []
    for version in (version for several in shelf.versions.values() for version in several):
        arrival = shelf.state.arrivals.get(version.key)
        digest = arrival.digest if arrival else None
        stored.append({"id": version.spec, "digest": digest, "loaded": digest in loaded})
    return {
        "adapters": [_described(serving, version) for version in versions],
        "aliases": [_shown(pointer) for pointer in fleet.pointers().values()],
        "registry": stored,
    }
