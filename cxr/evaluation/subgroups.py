"""Metrics by subgroup of the images: by sex, age, view, or the columns of a table such as device and site."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.errors import UserError
from cxr.evaluation.run import Content, ReportOptions, Run, read_scores
from cxr.metrics.bootstrap import MeanInterval
from cxr.reporting.forest import ForestLine, forest_figure
from cxr.reporting.page import Block, Details, Section, save_picture
from cxr.reporting.tables import Table, csv_text, interval
from cxr.sources.csv_table import folded
from cxr.sources.group_table import group_columns, read_groups
from cxr.wording import counted

FEW_PATIENTS = 10  # in a group: below this number, figures would say nothing
UNKNOWN = "unknown"
COLUMNS = {  # what --by can name without a table
    "sex": schema.SEX,
    "age": schema.AGE_YEARS,
    "view": schema.VIEW,
    "modality": schema.MODALITY,
    "body_part": schema.BODY_PART,
}
_AGES = {"0 to 17": 0, "18 to 39": 18, "40 to 59": 40, "60 to 74": 60, "75 or older": 75}  # the first year of each
_SEXES = {"F": "female", "M": "male", "O": "other"}
_MOST_GROUPS = 30  # of one column; a column with more is an id or a free text
PICTURES = "pictures"


@dataclass(frozen=True)
class Group:
    """A part of the images.

    Args:
        values: metrics by name; empty if there are too few patients.
    """

    name: str
    images: int
    patients: int
    values: Mapping[str, MeanInterval]

    def cell(self, metric: str) -> str:
        """The value of a metric with its interval; a dash if it cannot be measured."""
        if metric not in self.values:
            return "–"
        of = self.values[metric]
        return interval(of.value, of.low, of.high, 3 if abs(of.value) <= 1 else 1)


def check_columns(options: ReportOptions) -> None:
    """Raise UserError if a column of `options.by` is unknown."""
    listed = _listed(options.groups)
    for name in options.by_columns:
        if name not in COLUMNS and folded(name) not in listed:
            others = f" and the columns of {options.groups} ({', '.join(listed)})" if listed else ""
            raise UserError(
                f"expected --by with columns among {', '.join(COLUMNS)}{others}, got {name!r}: use one of these "
                f"names, or name a table with this column for each image or patient with --groups"
            )


def _listed(groups: str) -> list[str]:
    """The names of the columns of a table of groups, without case."""
    return [folded(name) for name in group_columns(groups)] if groups else []


def with_subgroups(content: Content, out: str) -> Content:
    """The content with a section of metrics by the columns of `options.by`; writes OUT/subgroups.csv and a figure.

    Raises:
        UserError: a column has too many values.
    """
    names = content.options.by_columns
    if not names:
        return content
    measures = content.measures
    if measures is None:
        print(f"note: there are no metrics of {content.run.family} by subgroup without ground truth", flush=True)
        return content
    columns = _columns(content.run, measures.image_ids, names, content.options.groups)
    numbers = np.arange(len(measures.image_ids))

    def group(name: str, places: np.ndarray) -> Group:
        patients = len(np.unique(measures.patients[places]))
        values = measures.measure(places) if patients >= FEW_PATIENTS else {}
        return Group(name, len(places), patients, values)

    whole = group("all images", numbers)
    groups: dict[str, list[Group]] = {}
    for name, values in columns.items():
        of_image = np.array(values)
        groups[name] = [group(value, np.flatnonzero(of_image == value)) for value in _order(name, values)]
    metrics = [metric for metric in whole.values if "/" not in metric]
    blocks: list[Block] = [_explanation(content)]
    blocks += [_table(f"By {_spoken(name)}", [whole, *of], metrics) for name, of in groups.items()]
    if metrics:
        lines = [ForestLine(whole.name, whole.values, reference=True)]
        for name, listed in groups.items():
            lines.append(ForestLine(f"by {_spoken(name)}"))
            lines += [ForestLine(f"{of.name} ({of.images:,})", of.values) for of in listed if of.values]
        caption = (
            "Each metric by subgroup, with 95 % intervals by patient. The dashed line is the value of all images."
        )
        figure = forest_figure(lines, metrics)
        blocks.append(save_picture(figure, storage.join(out, PICTURES), "subgroups.png", caption))
    if by_finding := [metric for metric in whole.values if "/" in metric]:
        tables = [_by_finding(f"By {_spoken(name)}", [whole, *of], by_finding) for name, of in groups.items()]
        blocks.append(Details(f"{by_finding[0].partition('/')[0]} of each finding by subgroup", tables))
    uri = storage.join(out, "subgroups.csv")
    storage.write_text(uri, csv_text(_rows({"": [whole], **groups})))
    section = Section("By subgroup", blocks)
    return replace(content, sections=[*content.sections, section], result=content.result | {"subgroups": uri})


def _columns(run: Run, image_ids: Sequence[str], names: Sequence[str], groups: str) -> dict[str, list[str]]:
    """The group of each image by each of these columns."""
    listed = _listed(groups)
    read = [schema.SOURCE_URI, schema.PATIENT_ID, *COLUMNS.values()]
    parts = read_scores(run, [schema.IMAGE_ID], optional=read)
    table = pa.concat_tables(part.select([schema.IMAGE_ID, *read]).replace_schema_metadata() for part in parts)
    table = table.take(
        pc.index_in(pa.array(image_ids, pa.string()), value_set=table[schema.IMAGE_ID].combine_chunks())
    )
    uris = pc.coalesce(table[schema.SOURCE_URI], table[schema.IMAGE_ID])
    table = table.set_column(table.schema.get_field_index(schema.SOURCE_URI), schema.SOURCE_URI, uris)
    own = [name for name in names if folded(name) in listed]  # the table's columns come first
    from_table = read_groups(groups, own, table) if own else {}
    columns = {
        name: [value or UNKNOWN for value in from_table[name]] if name in from_table else _of_scores(table, name)
        for name in names
    }
    for name, values in columns.items():
        if (count := len(set(values))) > _MOST_GROUPS:
            raise UserError(
                f"expected at most {_MOST_GROUPS} groups by {name}, got {count:,}: use a column with fewer values"
            )
    return columns


def _of_scores(table: pa.Table, name: str) -> list[str]:
    values = table[COLUMNS[name]].to_pylist()
    if name == "age":
        return [age_group(years) for years in values]
    return [_SEXES.get(value, value) if name == "sex" else value for value in (value or UNKNOWN for value in values)]


def age_group(years: float | None) -> str:
    if years is None or math.isnan(years) or years < 0:
        return UNKNOWN
    return next(name for name, first in reversed(_AGES.items()) if years >= first)


def _order(name: str, values: Sequence[str]) -> list[str]:
    """The groups: our own age groups in their order, then others by size; unknown is the last."""
    counts = Counter(values)
    ages = [value for value in _AGES if value in counts] if name == "age" else []
    others = [value for value, _ in counts.most_common() if value not in (*ages, UNKNOWN)]
    return [*ages, *others] + [UNKNOWN] * (UNKNOWN in counts)


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _explanation(content: Content) -> str:
    return (
        "The same metrics on subgroups of the images. Intervals are percentile intervals of "
        f"{counted(content.options.resamples, 'bootstrap resample')} of the patients of a group. A group with fewer "
        f"than {FEW_PATIENTS} patients is listed without figures. Means over findings include only findings that can "
        "be measured in a group, which may differ between groups. With many groups, some differ by chance."
    )


def _table(caption: str, groups: Sequence[Group], metrics: Sequence[str]) -> Table:
    rows = [
        [of.name, f"{of.images:,}", f"{of.patients:,}", *(of.cell(metric) for metric in metrics)] for of in groups
    ]
    return Table(["group", "images", "patients", *(f"{metric} (95 %)" for metric in metrics)], rows, caption)


def _by_finding(caption: str, groups: Sequence[Group], metrics: Sequence[str]) -> Table:
    rows = [[metric.partition("/")[2], *(of.cell(metric) for of in groups)] for metric in metrics]
    return Table(["finding", *(of.name for of in groups)], rows, caption)


def _rows(groups: Mapping[str, Sequence[Group]]) -> list[dict[str, Any]]:
    """Lines of subgroups.csv: one for each group and metric; a group without figures has one line."""
    unmeasured = {"": MeanInterval(math.nan, math.nan, math.nan)}
    return [
        {"by": name, "group": of.name, "images": of.images, "patients": of.patients, "metric": metric}
        | {"value": value.value, "low": value.low, "high": value.high}
        for name, listed in groups.items()
        for of in listed
        for metric, value in (of.values or unmeasured).items()
    ]
