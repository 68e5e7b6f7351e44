"""A panel: checkpoints of any family that score an archive in one pass, and the table of their scores."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, cast, get_args

import pyarrow as pa
import yaml

from cxr import schema, storage
from cxr.data.run_ledger import INCREMENTS, SCORES, UNFINISHED, family_of
from cxr.errors import UserError
from cxr.families.checkpoint_files import read_about
from cxr.inference.options import Precision

if TYPE_CHECKING:
    from cxr.families.checkpoint import Checkpoint

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_NAMED = re.compile(rf"({_NAME.pattern})=(.+)", re.DOTALL)
_RESERVED = (SCORES, UNFINISHED, INCREMENTS, "latents", "embeddings", "exports", "audit", "weights", "headers")
"""Folders of a result."""
_REASON_CHARS = 200  # of a YAML error in a message
_CHECKPOINT_FOLDERS = ("checkpoint", "best")  # names that training gives to folders of checkpoints


@dataclass(frozen=True)
class Member:
    """A checkpoint of a panel."""

    name: str
    """Its scores are the columns NAME/COLUMN. Empty: the only checkpoint, whose columns have no prefix."""
    checkpoint: str
    """Folder or URI."""
    batch_size: int | None = None
    """Number of images per forward pass; None: that of the options."""
    precision: Precision | None = None
    """Precision of convolutions and matrix products; None: that of the options."""
    thresholds_file: str = ""
    """Folder or URI of decision thresholds; see `families.thresholds_file`."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """The decision thresholds that replace the checkpoint's own, read from that file or given in the options."""

    def folder(self, out: str) -> str:
        """The folder of the member's pictures, latents and embeddings in a result."""
        return storage.join(out, self.name) if self.name else out


@dataclass(frozen=True)
class Panel:
    """One or more checkpoints.

    Raises:
        UserError: there is none, or a name is invalid, reserved or given twice.
    """

    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        if not self.members:
            raise UserError("expected at least one checkpoint in a panel, got none: add one")
        if not self.is_single:
            for name, count in Counter(member.name for member in self.members).items():
                _check_name(name)
                if count > 1:
                    raise UserError(f"expected different names of members, got {name!r} {count} times: rename one")

    @property
    def is_single(self) -> bool:
        """Whether there is only one checkpoint, without a name."""
        return [member.name for member in self.members] == [""]

    @property
    def names(self) -> list[str]:
        return [member.name for member in self.members]

    @classmethod
    def of(cls, checkpoints: Sequence[str]) -> Self:
        """The panel of these checkpoints, each a URI or NAME=URI.

        A single URI has an empty name. Of several, each without a name is named after the last folder of its URI, or
        the folder above one named "checkpoint", with a number if the name is taken.
        """
        if len(checkpoints) == 1 and not _NAMED.fullmatch(checkpoints[0]):
            return cls((Member("", storage.normalize(checkpoints[0])),))
        named = [match.groups() if (match := _NAMED.fullmatch(uri)) else (None, uri) for uri in checkpoints]
        taken = {*_RESERVED, *(name for name, _ in named if name)}
        members = []
        for name, uri in named:
            name = name or _free_name(_default_name(uri), taken)
            taken.add(name)
            members.append(Member(name, storage.normalize(uri)))
        return cls(tuple(members))

    @classmethod
    def read(cls, uri: str) -> Self:
        """The panel that a YAML file describes; relative paths in it are relative to its folder.

        Raises:
            UserError: the file does not exist, or does not describe a panel; the message says where.
        """
        uri = storage.normalize(uri)
        if not storage.exists(uri):
            raise UserError(
                f"expected the file of a panel, got {uri}, which does not exist: name the panel's YAML file with "
                "--panel"
            )
        try:
            content = yaml.load(storage.read_bytes(uri), _UniqueKeyLoader)  # a SafeLoader
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())[:_REASON_CHARS]
            raise UserError(
                f"{uri}: expected a YAML file, got an error ({reason}): correct the line that it names"
            ) from None
        if not isinstance(content, dict) or [*content] != ["members"]:
            raise UserError(
                f"{uri}: expected the key members and no other, got {_keys(content)}: list all checkpoints under "
                "members"
            )
        if not isinstance(content["members"], dict):
            got = type(content["members"]).__name__
            raise UserError(
                f"{uri}: expected members to be a mapping of names to checkpoints, got {got}: write a line NAME: URI "
                "for each"
            )
        return cls(tuple(_member(name, entry, uri) for name, entry in content["members"].items()))


class _UniqueKeyLoader(yaml.SafeLoader):
    """Rejects mappings in which a key occurs twice, of which YAML loaders silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _keys(content: object) -> str:
    if not isinstance(content, dict):
        return type(content).__name__
    return f"the keys {', '.join(map(str, content)) or '(none)'}"


def _member(name: object, entry: object, uri: str) -> Member:
    """A member of the panel file at `uri`: its checkpoint, or a mapping with the checkpoint and its options."""
    where = f"{uri}: member {name}"
    if not isinstance(name, str):
        raise UserError(f"{where}: expected a name, got {type(name).__name__}: put it in quotes")
    values = {"checkpoint": entry} if isinstance(entry, str) else entry
    known = ("checkpoint", "batch_size", "precision", "thresholds")
    if not isinstance(values, dict) or "checkpoint" not in values or set(values) - {*known}:
        raise UserError(
            f"{where}: expected the URI of a checkpoint, or checkpoint and some of {', '.join(known[1:])}, got "
            f"{_keys(values)}: remove the other keys, and add checkpoint if it is missing"
        )
    checkpoint, batch_size, precision, thresholds = (values.get(key) for key in known)
    for key, location in (("checkpoint", checkpoint), ("thresholds", thresholds)):
        if key in values and (not isinstance(location, str) or not location):
            raise UserError(f"{where}: expected {key} to be a URI, got {location!r}: put a path or URI in quotes")
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise UserError(f"{where}: expected batch_size to be a whole number of 1 or more, got {batch_size!r}")
    if precision is not None and precision not in get_args(Precision):
        expected = ", ".join(get_args(Precision))
        raise UserError(f"{where}: expected precision to be one of {expected}, got {precision!r}")
    folder = uri.rpartition("/")[0]
    return Member(
        name,
        _located(cast("str", checkpoint), folder),
        batch_size,
        cast("Precision | None", precision),
        _located(thresholds, folder) if thresholds else "",
    )


def _located(uri: str, folder: str) -> str:
    """The normal form of a URI or path, which may be relative to `folder`."""
    return storage.normalize(uri) if uri.startswith("~") else storage.resolve(uri, folder)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"expected the name of a member to consist of letters, digits, - and _, got {name!r}: rename it"
        )
    if name in _RESERVED:
        raise UserError(f"{name!r} cannot be the name of a member, because OUT has a folder {name}: rename it")


def _default_name(uri: str) -> str:
    folders = [folder for folder in storage.normalize(uri).rpartition("://")[2].split("/") if folder]
    while len(folders) > 1 and folders[-1] in _CHECKPOINT_FOLDERS:
        folders.pop()
    return re.sub(r"[^A-Za-z0-9_-]+", "-", folders[-1]).strip("-") if folders else ""


def _free_name(name: str, taken: set[str]) -> str:
    """`name`, or with the first number from 2 that makes it differ from those that are taken."""
    numbered, number = name or "member", 1
    while numbered in taken:
        number += 1
        numbered = f"{name or 'member'}-{number}"
    return numbered


def member_record(name: str, model: Checkpoint) -> dict[str, Any]:
    """A checkpoint's entry in the metadata `schema.MEMBERS_KEY`; the family of an ensemble is that of its members."""
    return {
        "name": name,
        "family": family_of(model.recipe.to_dict()),
        "checkpoint": model.uri,
        "sha256": model.about["sha256"],
        "findings": list(model.findings),
    }


def join_scores(tables: Mapping[str, pa.Table]) -> pa.Table:
    """The scores of the same images by several checkpoints as one table; see `schema.member_column`.

    Args:
        tables: from `Scorer.table`, by the names of the members. A single one without a name is returned as it is.
    """
    if [*tables] == [""]:
        return tables[""]
    columns: dict[str, pa.ChunkedArray] = {}
    records = []
    for member, table in tables.items():
        columns |= {schema.member_column(member, name): table[name] for name in table.column_names}
        records += [record | {"name": member} for record in json.loads(table.schema.metadata[schema.MEMBERS_KEY])]
    shared = [name for name in schema.SCORES.names if name in columns]
    order = [*shared, *(name for name in columns if name not in shared)]
    table = pa.table({name: columns[name] for name in order})
    return table.replace_schema_metadata(
        {schema.MEMBERS_KEY: json.dumps(records), schema.SCORES_VERSION_KEY: str(schema.SCORES_VERSION)}
    )


def given_panel(panel: str, checkpoint: Sequence[str]) -> tuple[Panel | None, list[dict[str, Any]]]:
    """The checkpoints that `--panel` or `--checkpoint` name, and the recipe of each; None if neither is given.

    Raises:
        UserError: a checkpoint does not exist, or both options are given.
    """
    if panel and checkpoint:
        raise UserError("expected --panel or --checkpoint, got both: add the checkpoint to the file of the panel")
    if not (panel or checkpoint):
        return None, []
    given = Panel.read(panel) if panel else Panel.of(checkpoint)
    return given, [read_about(member.checkpoint)["recipe"] for member in given.members]
