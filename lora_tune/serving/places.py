"""An adapter's place in the engine: how a version gets one (VERIFY, STAGE, PROBE) and gives it back."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from lora_tune.adapter.door import AdapterFiles
from lora_tune.adapter.fence import fence_template
from lora_tune.adapter.live import CONV1D_FAMILIES, check_belongs, check_fits, own_template
from lora_tune.data.rendering import LossMaskError
from lora_tune.data.tokens import end_of_turn_ids
from lora_tune.errors import (
    AdapterMismatchError,
    BusyError,
    ConflictError,
    LoraTuneError,
    RefusedError,
    UnsupportedError,
)
from lora_tune.model.dense import BaseFiles
from lora_tune.model.fingerprint import read_config, read_shapes
from lora_tune.model.load import load_tokenizer
from lora_tune.serving.deployed import Deployed
from lora_tune.serving.engine import Engine, ServedBase
from lora_tune.serving.probing import probe
from lora_tune.serving.sources import Found
from lora_tune.serving.table import Table

_LOG = logging.getLogger(__name__)
_LET_GO_SECONDS = 5.0
"""How long the engine may take to end an answer that was cancelled or given back."""
_POLL_SECONDS = 0.005


class Places:
    """The engine's places; whoever calls holds the lock of the version's name."""

    def __init__(self, engine: Engine, base: ServedBase, table: Table) -> None:
        self._engine = engine
        self._base = base
        self._table = table
        self._belonging: set[str] = set()
        self._ending: set[str] = set()
        """Adapters' own templates whose ends of turn the base's `ends` hold."""

    def bring_in(self, found: Found, *, make_room: Callable[[], bool] | None) -> Deployed:
        """Return a version that answers as its passport says; on failure the engine is as it was.

        Args:
            found: checked by the door.
            make_room: frees a place and says whether it could; asked once when all are taken.

        Raises:
            RefusedError: it does not belong to this base, or answers otherwise than its passport says (412).
            UnsupportedError: this engine cannot hold such an adapter (422).
            BusyError: every place is taken (429).
        """
        self._check_belongs(found.files)
        self._check_ends(found)
        version = Deployed(found.name, found.number, found.digest, found.files, "unverified", time.time())
        holder = self._table.holder(version.key)
        if holder is not None:
            if holder.digest != found.digest:
                raise RefusedError(
                    f"{found.id} and {holder.id} differ, but their digests begin alike: {found.digest[:12]}…",
                    hint="load it under another name",
                )
            return replace(version, verdict=holder.verdict)
        self._stage(version, make_room)
        try:
            return replace(version, verdict=self._verdict(version), loaded_at=time.time())
        except BaseException:
            self.drop(version)
            raise

    def drop(self, version: Deployed) -> None:
        """Undo a staging after a failure, which is what the caller is told of."""
        if self._table.holder(version.key) is not None:
            return
        try:
            self.let_go(version)
        except LoraTuneError as err:
            _LOG.warning("the engine keeps the unused adapter %s: %s", version.key, err.message)

    def let_go(self, version: Deployed) -> None:
        """Give a place back; raises ConflictError when an answer goes on using it (409)."""
        until = time.monotonic() + _LET_GO_SECONDS
        while time.monotonic() < until:
            with suppress(ConflictError):  # its last answer is at its last token
                return self._engine.unload(version.key)
            time.sleep(_POLL_SECONDS)
        return self._engine.unload(version.key)

    def _check_belongs(self, files: AdapterFiles) -> None:
        """Raise AdapterMismatchError unless base, tokenizer and template are the adapter's own (412).

        What a passport says of them is compared once for all that say the same: that reads the tokenizer, which takes a
        hundred times as long as the rest. The base in memory is that of the server's start, so the answer stays true.
        """
        manifest = files.manifest
        said = f"{manifest.base.model_dump_json()}{manifest.tokenizer.model_dump_json()}" if manifest else ""
        if said not in self._belonging:
            check_belongs(files, self._base.files)
            self._belonging.add(said)
            return
        folder = self._base.files.folder
        conv1d = read_config(folder).get("model_type") in CONV1D_FAMILIES
        check_fits(files, read_shapes(folder), conv1d=conv1d)

    def _check_ends(self, found: Found) -> None:
        """Raise UnsupportedError when answers would run on past the end of a turn (422)."""
        template = own_template(found.files)
        if template is None or template in self._ending:
            return
        if not set(ends_of(self._base.files, template)) <= set(self._base.ends):
            raise UnsupportedError(
                f"{found.id} ends its turns with a token that this server does not stop at",
                hint="name it when the server starts: --adapter",
            )
        self._ending.add(template)

    def _stage(self, version: Deployed, make_room: Callable[[], bool] | None) -> None:
        try:
            self._engine.load(version.key, version.files)
        except BusyError:
            if make_room is None or not make_room():
                raise
            self._engine.load(version.key, version.files)

    def _verdict(self, version: Deployed) -> str:
        if version.files.manifest is None:
            return "unverified"
        result = probe(self._engine, self._base, version.key, version.files)
        if result.verdict == "different":
            raise AdapterMismatchError(
                f"{version.id} does not answer through the {self._engine.name} engine as its passport says: its answers "
                f"are {result.kl:.2g} nats a token away, {result.top1_agreement:.0%} of its tokens are the same "
                f"(the base without it is {result.kl_of_base:.2g} away)",
                hint="`lora-tune adapters verify` shows whether it answers as trained elsewhere; the base may be held in "
                "another dtype or quantization than in training",
            )
        return result.verdict


def ends_of(files: BaseFiles, template: str) -> list[int]:
    """Return the ids that end an answer in an adapter's own template; none when it cannot be known."""
    try:
        return end_of_turn_ids(fence_template(load_tokenizer(files, template_text=template)))
    except LossMaskError:
        return []  # it cannot be trained on, and was not
