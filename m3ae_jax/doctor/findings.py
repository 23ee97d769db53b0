"""The data doctor's findings in words, what matters most first."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

PROBLEM, ADVICE, FACT = range(3)

# Shares from which on something is reported, and from which on it is a problem.
_REPORTED = 0.005
_MANY = 0.05


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
    findings += _speed_findings(report["speed"])
    return sorted(findings, key=lambda finding: finding.level)


def _source_findings(source: dict[str, Any], config: ConfigDict) -> list[Finding]:
    findings = []
    looked = source["looked_at"]
    left_out = sum(source["left_out"].values())
    if left_out:
        first = source["left_out_e.g."]
        reasons = ", ".join(f"{why} {count:,}, e.g. {first.get(why, '?')}" for why, count in source["left_out"].items())
        share = left_out / (left_out + source["examples"])
        findings.append(Finding(ADVICE if share < _MANY else PROBLEM, f"{left_out:,} left out at indexing: {reasons}"))
    if "unreadable" in looked:
        first = looked["unreadable"]["examples"][0]
        text = f"{percent(looked['unreadable']['share'])} of the examples cannot be read, e.g. {_place(first)}"
        findings.append(Finding(PROBLEM, f"{text}: {first['error']}"))
    if "pictures" in looked:
        findings += _picture_findings(looked["pictures"], config)
    if "captions" in looked:
        findings += _caption_findings(looked["captions"])
    return findings


def _place(example: dict[str, Any]) -> str:
    return f"{example['source']} example {example['index']:,}"


def _picture_findings(pictures: dict[str, Any], config: ConfigDict) -> list[Finding]:
    findings = []
    size, bad = config.data.image_size, pictures["unusable_share"]
    if bad:
        reasons = ", ".join(
            f"{percent(one['share'])} {reason}, e.g. {_place(one['examples'][0])}"
            for reason, one in pictures["unusable"].items()
        )
        most = config.data.max_bad_fraction
        stops = f"; above data.max_bad_fraction={most}, so training stops" if bad > most else ""
        text = f"{percent(bad)} of the pictures do not decode and are replaced: {reasons}{stops}"
        findings.append(Finding(PROBLEM if bad > most else ADVICE, text))
    else:
        findings.append(Finding(FACT, f"all {pictures['count']:,} pictures decode"))
    small = pictures["smaller_than_image_size"]["share"]
    if small > _REPORTED:
        text = f"{percent(small)} of the pictures are smaller than data.image_size={size} and are enlarged"
        findings.append(Finding(ADVICE if small > _MANY else FACT, text))
    repeated = pictures["repeated"]["share"]
    if repeated > _REPORTED:
        text = f"{percent(repeated)} of the pictures are exact copies of another one of the sample"
        findings.append(Finding(ADVICE, text))
    return findings


def _caption_findings(captions: dict[str, Any]) -> list[Finding]:
    findings = []
    for key, text in (
        ("empty", "of the captions are empty"),
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
    return findings


def _budget_finding(captions: dict[str, Any]) -> Finding:
    budget, wanted, unit = captions["max_text_tokens"], captions["recommended"], captions["unit"]
    cut = captions["cut"][str(budget)]["share"]
    text = f"data.max_text_tokens={budget} cuts {percent(cut)} of the captions"
    if unit == "words":
        return Finding(
            ADVICE,
            f"counted in words, for no tokenizer is named: {text}; {wanted} words would do for 99 %, and a "
            "word is one token or more",
        )
    if wanted > budget:
        return Finding(PROBLEM if cut > _MANY else ADVICE, f"{text}; {wanted} would keep 99 % of them whole")
    if wanted < budget:
        return Finding(ADVICE, f"{text}; {wanted} would do for 99 %")
    return Finding(FACT, f"{text}, and no smaller multiple of 8 keeps 99 % of them whole")


def _speed_findings(speed: dict[str, Any]) -> list[Finding]:
    rate, cores = speed["examples_per_second"], speed["cores"]
    if not rate:
        return []
    here = f"the pipeline makes {rate:,.0f} examples/s on these {cores} cores"
    findings = []
    for need in speed["needed"]:
        wanted = need["examples_per_second"]
        work = f"{wanted / rate * cores:,.0f} such cores' work"
        text = f"{here}; at its chips' peak {need['topology']} would take {wanted:,.0f}: {work}"
        findings.append(Finding(ADVICE if wanted > rate else FACT, text))
    return findings or [Finding(FACT, here)]
