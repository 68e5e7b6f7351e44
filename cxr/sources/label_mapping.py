"""Rename, merge and leave out the findings of labels, and decide what uncertain labels count as.

A mapping file is YAML or JSON:

    findings:                        # word in the labels: finding
      enlarged heart: Cardiomegaly
      Effusion: Pleural effusion
      hydrothorax: Pleural effusion  # several words of one finding
    ignore: [Support Devices]        # words that are not findings
    no_finding: [unremarkable]       # words for images without findings
    uncertain_as:                    # uncertain labels of single findings; --uncertain-as applies to the others
      Cardiomegaly: positive         # unknown, negative or positive: U-Ignore, U-Zeros, U-Ones (Irvin et al. 2019)

Words are compared by their letters and digits, regardless of case. Other words remain separate findings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import numpy as np
import yaml

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources.annotations import NO_FINDING_WORDS
from cxr.sources.label_rows import word_key
from cxr.sources.options import LabelPolicy

_VALUES: dict[LabelPolicy, int] = {
    "unknown": schema.UNKNOWN,
    "negative": schema.NEGATIVE,
    "positive": schema.POSITIVE,
}
_KEYS = ("findings", "ignore", "no_finding", "uncertain_as")
_NO_FINDING = NO_FINDING_WORDS | {"none"}
_SHOWN = 60  # letters of a value in an error message


@dataclass(frozen=True)
class LabelMapping:
    """Meaning of the words of labels. All words are `word_key`s."""

    findings: Mapping[str, str] = field(default_factory=dict)  # by word
    ignored: frozenset[str] = frozenset()
    no_finding: frozenset[str] = _NO_FINDING
    uncertain_as: LabelPolicy = "unknown"
    uncertain_as_by_finding: Mapping[str, LabelPolicy] = field(default_factory=dict)  # by the finding's `word_key`

    def finding(self, word: str) -> str | None:
        """The finding that a word means; None if the word is ignored."""
        key = word_key(word)
        return None if key in self.ignored else self.findings.get(key, word)

    def uncertain_label(self, finding: str) -> int:
        """The label of an image in which the finding is uncertain."""
        return _VALUES[self.uncertain_as_by_finding.get(word_key(finding), self.uncertain_as)]

    def merge(self, labels_NW: np.ndarray, words: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
        """Labels by finding, int8 (N, findings), from labels by word, and the findings in the order of their words.

        A finding with several words is positive if any of them is, and negative if all of them are.
        """
        by_key: dict[str, tuple[str, list[int]]] = {}
        for number, word in enumerate(words):
            if (finding := self.finding(word)) is not None:
                by_key.setdefault(word_key(finding), (finding, []))[1].append(number)
        merged = np.full((len(labels_NW), len(by_key)), schema.UNKNOWN, np.int8)
        for label_N, (_, numbers) in zip(merged.T, by_key.values(), strict=True):
            of_finding = labels_NW[:, numbers]
            label_N[(of_finding == schema.NEGATIVE).all(1)] = schema.NEGATIVE
            label_N[(of_finding == schema.POSITIVE).any(1)] = schema.POSITIVE
        return merged, tuple(finding for finding, _ in by_key.values())


def read_mapping(uri: str, uncertain_as: LabelPolicy) -> LabelMapping:
    """Read a mapping file; without a URI, every word is a finding.

    Raises:
        UserError: it is not such a file.
        StorageError: it cannot be read.
    """
    if not uri:
        return LabelMapping(uncertain_as=uncertain_as)
    location = storage.normalize(uri)
    try:
        content = yaml.safe_load(storage.read_bytes(location))  # JSON, too, is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{location}: expected a YAML or JSON file, got an error ({reason}): correct the line that it names"
        ) from None
    if not isinstance(content, dict) or not content or set(content) - set(_KEYS):
        got = ", ".join(map(str, content))[:_SHOWN] if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{location}: expected some of the keys {', '.join(_KEYS)}, got {got or 'none'}: use these keys"
        )
    findings, policies = (_texts_by_text(content, key, location) for key in ("findings", "uncertain_as"))
    for finding, policy in policies.items():
        if policy not in get_args(LabelPolicy):
            expected = ", ".join(get_args(LabelPolicy))
            raise UserError(
                f"{location}: expected {expected} for {finding!r}, got {policy!r}: use one of these words in "
                "uncertain_as"
            )
    ignored, no_finding = (
        frozenset(map(word_key, _texts(content, key, location))) for key in ("ignore", "no_finding")
    )
    by_word = {word_key(word): finding for word, finding in findings.items()}
    if contradictory := ignored & {*by_word} or no_finding & {*by_word} or ignored & no_finding:
        raise UserError(
            f"{location}: expected each name in only one of findings, ignore and no_finding, got "
            f"{min(contradictory)!r} in two: remove one"
        )
    return LabelMapping(
        by_word,
        ignored,
        LabelMapping.no_finding | no_finding,
        uncertain_as,
        {word_key(finding): cast(LabelPolicy, policy) for finding, policy in policies.items()},
    )


def _texts_by_text(content: Mapping[str, Any], key: str, location: str) -> dict[str, str]:
    value = content.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise UserError(
            f"{location}: expected a mapping in {key}, got {str(value)[:_SHOWN]!r}: write lines such as Name: text"
        )
    return value


def _texts(content: Mapping[str, Any], key: str, location: str) -> list[str]:
    value = content.get(key) or []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(
            f"{location}: expected a list of names in {key}, got {str(value)[:_SHOWN]!r}: write it as [A, B]"
        )
    return value
