"""The data doctor's findings in words, what matters most first."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from m3ae_jax.data.annotations import number_of
from m3ae_jax.data.sources.index import LOST

PROBLEM, ADVICE, FACT = range(3)

# Shares from which on something is reported, and from which on it is a problem.
_REPORTED = 0.005
_MANY = 0.05
_NEARLY_ALL = 0.99  # of captions that are empty or absent: training stops
_MOST = 0.5  # of pictures that are smaller than data.image_size, of labelled examples that have no class

# What `concatenated.ignore_beside` leaves out: of what is counted, not examples.
_FILES = {"compressed or unfinished file": "files", "folder of such files": "folders"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One of them.

    Attributes:
        level: `PROBLEM`, `ADVICE` or `FACT`.
        text: one sentence.
    """

    level: int
    text: str


def percent(share: float) -> str:
    """``0.3 %``, ``12 %``; of the tiniest share one digit."""
    value = 100 * share
    if value == 0 or value >= 99.95:
        return f"{value:.0f} %"
    return f"{value:.0f} %" if value >= 20 else f"{value:.1f} %" if value >= 0.1 else f"{value:.1g} %"


def find(report: dict[str, Any], config: ConfigDict) -> list[Finding]:
    """What follows from the report of `inspection.inspect`, sorted."""
    findings = [Finding(PROBLEM, text) for text in report["troubles"]]
    for name, source in report["sources"].items():
        prefix = f"{name}: " if len(report["sources"]) > 1 else ""
        findings += [Finding(one.level, prefix + one.text) for one in _source_findings(source, config)]
    for name, part in report["held_out"].items():
        findings += [Finding(one.level, f"{name}: {one.text}") for one in _held_out_findings(part)]
    for name, common in report["overlap"].items():
        findings.append(_overlap_finding(name, common))
    for one in report["annotations"]:
        findings += _annotation_findings(one)
    for folder, count in report["passed_over"].items():
        text = f"{folder}: its {number_of(count, 'smallest JSON files')} {'is' if count == 1 else 'are'} not looked at"
        findings.append(Finding(FACT, f"{text}; they may be annotations"))
    findings += _speed_findings(report["speed"])
    return sorted(findings, key=lambda finding: finding.level)


def _source_findings(source: dict[str, Any], config: ConfigDict) -> list[Finding]:
    looked = source["looked_at"]
    findings = [*_opening_findings(source), *_unreadable_findings(looked)]
    most = config.data.max_bad_fraction
    if "pictures" in looked:
        findings += _picture_findings(looked["pictures"], config)
    if "captions" in looked:
        findings += _absence_findings(source, "training", most)
        findings += _caption_findings(looked["captions"])
    replaced = looked["replaced"]["share"]
    alone = [looked["pictures"]["unusable_share"]] if "pictures" in looked else []
    alone += [looked["captions"]["absent"]["share"]] if "captions" in looked else []
    if replaced > most >= max(alone, default=0.0):
        text = f"{percent(replaced)} of the examples would be replaced by others, for all reasons together"
        findings.append(Finding(PROBLEM, f"{text}; above data.max_bad_fraction={most}, so training stops"))
    return findings


def _opening_findings(source: dict[str, Any]) -> list[Finding]:
    """What of a source is left out, and what is not read."""
    examples = {kind: count for kind, count in source["left_out"].items() if kind not in _FILES}
    findings = []
    if count := sum(examples.values()):
        # What a lost file held may not be known: then it counts as one example.
        least = "at least " if examples.keys() & set(LOST) else ""
        text = f"{least}{number_of(count, 'examples')} left out: {_kinds(source, 'left_out', examples)}"
        findings.append(Finding(_level(count, source["examples"]), text))
    for kind, count in source["left_out"].items():
        if kind in _FILES:
            text = f"{number_of(count, _FILES[kind])} that may hold examples left out: {kind}, e.g. "
            findings.append(Finding(_level(count, source["files"] or 0), text + source["left_out_e.g."][kind]))
    if source["not_read"]:
        findings.append(Finding(FACT, f"there, but not read: {_kinds(source, 'not_read', source['not_read'])}"))
    return findings


def _level(left_out: int, read: int) -> int:
    return ADVICE if left_out / (left_out + read) < _MANY else PROBLEM


def _kinds(source: dict[str, Any], name: str, counts: dict[str, int]) -> str:
    first = source[f"{name}_e.g."]
    return ", ".join(f"{kind} {count:,}, e.g. {first.get(kind, '?')}" for kind, count in counts.items())


def _unreadable_findings(looked: dict[str, Any]) -> list[Finding]:
    if "unreadable" not in looked:
        return []
    first = looked["unreadable"]["examples"][0]
    text = f"{percent(looked['unreadable']['share'])} of the examples cannot be read, e.g. {_place(first)}"
    return [Finding(PROBLEM, f"{text}: {first['error']}")]


def _place(example: dict[str, Any]) -> str:
    return f"{example['source']} example {example['index']:,}"


def _picture_findings(pictures: dict[str, Any], config: ConfigDict) -> list[Finding]:
    findings = []
    bad, most = pictures["unusable_share"], config.data.max_bad_fraction
    if bad:
        stops = f"; above data.max_bad_fraction={most}, so training stops" if bad > most else ""
        text = f"{percent(bad)} of the pictures do not decode and are replaced: {_reasons(pictures['unusable'])}{stops}"
        findings.append(Finding(PROBLEM if bad > most else ADVICE, text))
    else:
        findings.append(Finding(FACT, _all_decode(pictures["count"])))
    small = pictures["smaller_than_image_size"]["share"]
    if small > _REPORTED:
        text = f"{percent(small)} of the pictures are smaller than data.image_size={config.data.image_size} pixels"
        advice = _smaller_size(pictures, config) if small > _MOST else ""
        findings.append(Finding(ADVICE if small > _MANY else FACT, f"{text} and are enlarged{advice}"))
    repeated = pictures["repeated"]["share"]
    if repeated > _REPORTED:
        text = f"{percent(repeated)} of the pictures are exact copies of another one of the sample"
        findings.append(Finding(ADVICE, text))
    return findings


def _reasons(kinds: dict[str, Any]) -> str:
    """Shares by reason, each with an example."""
    return ", ".join(f"{percent(one['share'])} {why}, e.g. {_place(one['examples'][0])}" for why, one in kinds.items())


def _all_decode(count: int) -> str:
    return f"all {count:,} pictures decode" if count > 1 else "the one picture decodes"


def _smaller_size(pictures: dict[str, Any], config: ConfigDict) -> str:
    """Which ``data.image_size`` would enlarge few of them; empty where it is the one that is set."""
    patch, median = config.data.patch_size, pictures["shorter_side"]["median"]
    near = max(round(median / patch), 1) * patch
    if near >= config.data.image_size:
        return ""
    return f"; their shorter side's median is {number_of(round(median), 'pixels')}: data.image_size={near} would do"


def _absence_findings(source: dict[str, Any], what: str, most: float) -> list[Finding]:
    """Captions that are not there (a null, a missing field) or say nothing.

    Args:
        source: with captions among what was looked at.
        what: that stops where there is nothing else: ``training`` or ``validation``.
        most: share of replaced examples above which it stops.
    """
    findings = []
    captions = source["looked_at"]["captions"]
    absent, wordless = captions["absent"], captions["without_words"]["share"]
    if absent["count"]:
        stops = f"; above data.max_bad_fraction={most}, so {what} stops" if absent["share"] > most else ""
        text = f"{percent(absent['share'])} of the examples have no caption, not even an empty one, and are replaced"
        findings.append(Finding(PROBLEM if stops else ADVICE, f"{text}: {_reasons(absent['reasons'])}{stops}"))
    if wordless >= _NEARLY_ALL:
        kinds = ((wordless - absent["share"], "an empty caption"), (absent["share"], "none"))
        shares = ", ".join(f"{percent(share)} {kind}" for share, kind in kinds if share > 0)
        hint = "; does caption_key name the right field?" if "caption_key" in source["options"] else ""
        how = "no example" if wordless == 1 else "hardly an example"
        findings.append(Finding(PROBLEM, f"{how} has words ({shares}), so {what} stops{hint}"))
    return findings


def _caption_findings(captions: dict[str, Any]) -> list[Finding]:
    findings = []
    for key, text in (
        ("empty", "of the captions are empty (there, but of blanks or no characters)"),
        ("unknown_words_alone", "of the captions hold nothing that the tokenizer knows, and count as empty"),
        ("unknown_tokens", "of the tokens are unknown to the tokenizer"),
        ("not_utf8", "of the captions are not UTF-8"),
    ):
        share = captions[key]["share"]
        if share > _REPORTED:
            findings.append(Finding(PROBLEM if share > _MANY else ADVICE, f"{percent(share)} {text}"))
    if captions["repeated"]["share"] > _MANY:
        top = captions["most_repeated"][0]
        text = f"{percent(captions['repeated']['share'])} of the captions repeat another one of the sample"
        findings.append(Finding(FACT, f"{text}; {top['count']:,} times {top['caption'][:60]!r}"))
    if "cut" in captions:
        findings.append(_budget_finding(captions))
        findings += _endless_findings(captions)
    return findings


def _endless_findings(captions: dict[str, Any]) -> list[Finding]:
    endless = captions["endless"]
    if not endless["count"]:
        return []
    first, unit = endless["examples"][0], captions["unit"]
    text = f"{number_of(endless['count'], 'captions')} of more than {endless['more_than']:,} {unit}, e.g. "
    text += f"{_place(first)} of {first['tokens']:,}: {first['caption'][:60]!r}; not counted in the advice on lengths"
    return [Finding(PROBLEM if endless["share"] > _MANY else ADVICE, text)]


def _budget_finding(captions: dict[str, Any]) -> Finding:
    budget, wanted, unit = captions["max_text_tokens"], captions["recommended"], captions["unit"]
    cut = captions["cut"][str(budget)]["share"]
    text = f"data.max_text_tokens={budget} cuts {percent(cut)} of the captions"
    whom = "99 % of the others" if captions["endless"]["count"] else "99 %"
    if unit == "words":
        return Finding(
            ADVICE,
            f"counted in words, for no tokenizer is named: {text}; {wanted} words would do for {whom}, and a "
            "word is one token or more",
        )
    if wanted > budget:
        return Finding(PROBLEM if cut > _MANY else ADVICE, f"{text}; {wanted} would keep {whom} of them whole")
    if wanted < budget:
        return Finding(ADVICE, f"{text}; {wanted} would do for {whom}")
    return Finding(FACT, f"{text}, and no smaller multiple of 8 keeps {whom} of them whole")


def _held_out_findings(part: dict[str, Any]) -> list[Finding]:
    """Of data that are not trained on."""
    if "error" in part:
        return [Finding(PROBLEM, f"cannot be opened: {part['error']}")]
    looked = part["looked_at"]
    findings = [*_opening_findings(part), *_unreadable_findings(looked)]
    if "pictures" in looked:
        pictures = looked["pictures"]
        bad, reasons = pictures["unusable_share"], _reasons(pictures["unusable"])
        if not pictures["usable"]:
            text = f"not one of {number_of(pictures['count'], 'pictures')} decodes, so validation stops: {reasons}"
            findings.append(Finding(PROBLEM, text))
        elif bad:
            text = f"{percent(bad)} of {number_of(pictures['count'], 'pictures')} do not decode and are replaced"
            findings.append(Finding(PROBLEM if bad > _MANY else ADVICE, f"{text}: {reasons}"))
        else:
            findings.append(Finding(FACT, _all_decode(pictures["count"])))
    if "captions" in looked:
        findings += _absence_findings(part, "validation", 1.0)
    if unlabelled := part.get("unlabelled"):
        have, are = ("has", "is") if unlabelled == 1 else ("have", "are")
        text = f"{unlabelled:,} of {number_of(looked['examples'], 'examples')} {have} no class"
        where = f"e.g. example {part['unlabelled_e.g.']:,}"
        if unlabelled > _MOST * looked["examples"]:
            findings.append(Finding(PROBLEM, f"{text}, so its evaluations stop, {where}"))
        else:
            findings.append(Finding(ADVICE, f"{text} and {are} left out of its evaluations, {where}"))
    return findings


def _overlap_finding(name: str, common: dict[str, Any]) -> Finding:
    looked = f"{number_of(common['looked_at'], 'training pictures')} looked at"
    among = number_of(common["held_out_looked_at"], "pictures")
    if not common["count"]:
        return Finding(FACT, f"none of {looked} is among {among} of {name}")
    first = common["examples"][0]
    is_in = f"{first['is_source']} example {first['is_index']:,}"
    verb = "is" if common["count"] == 1 else "are"
    text = (
        f"{common['count']:,} of {looked} ({percent(common['share'])}) {verb} in {name} too, as {common['held_out']:,}"
    )
    text += f" of its {among}, e.g. {_place(first)} is {is_in}"
    # To fit probes on pictures of the pretraining is common; to measure on them is not.
    return Finding(FACT if name == "eval.train" else PROBLEM if common["share"] > _REPORTED else ADVICE, text)


def _annotation_findings(one: dict[str, Any]) -> list[Finding]:
    findings = [Finding(FACT, one["text"])]
    if one["missing"]:
        every, first = one["missing"] == one["of"], f"not there, e.g. {one['e.g.']}"
        text = f"{one['name']}: {one['missing']:,} of {number_of(one['of'], one['nouns'])} {first}"
        # Where there is none, they may well be packed in the data's files.
        findings.append(Finding(FACT if every else ADVICE, text))
    return findings


def _speed_findings(speed: dict[str, Any]) -> list[Finding]:
    rate, cores = speed["examples_per_second"], speed["cores"]
    if not rate:
        return []
    here = f"the pipeline makes {rate:,.{0 if rate >= 10 else 1}f} examples/s on {_cores(cores)}"
    findings = []
    for need in speed["needed"]:
        wanted = need["examples_per_second"]
        work = f"the work of {number_of(round(wanted / rate * cores), 'such cores')}"
        text = f"{here}; at its chips' peak {need['topology']} would take {wanted:,.0f} examples/s: {work}"
        findings.append(Finding(ADVICE if wanted > rate else FACT, text))
    return findings or [Finding(FACT, here)]


def _cores(cores: int) -> str:
    return f"these {cores} cores" if cores > 1 else "this core"
