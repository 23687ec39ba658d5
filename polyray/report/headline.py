"""Headline: the numbers that people quote, beside their controls and the paper's.

Place in the flow: second in every report. Each row names what the figure is, what the same figure is where nothing
should be found, and what the paper gives for its own setting.
"""

from typing import Any

from polyray.report import categorical, papers, sensitivity, summary
from polyray.report.content import Block, Missing, Prose, Section, Table
from polyray.report.plain import NOTHING, count, interval, number, percent, percent_interval, visible
from polyray.report.scores import unsummarised
from polyray.report.source import Source, layer_name

HEADS = ("figure", "here (95 % interval)", "beside it, as a control", "the paper")
_TITLE = "Headline numbers"


def headline(source: Source) -> Section:
    """The headline table of either method."""
    return _categorical(source) if source.is_categorical else _psi(source)


def _psi(source: Source) -> Section:
    blocks: list[Block] = []
    rows = _scored(source) if source.has("layer_summary") else []
    if not rows:
        blocks.append(Missing(unsummarised(source, "AUROC, depth trend or share of called neurons")))
    rows += _swapped(source) + _varied(source)
    if rows and source.setting("plant") is not None:
        note = (
            "These neurons were planted, to see whether the method finds what is known of them: their numbers say "
            "nothing of the network, and the paper has none beside them."
        )
        rows = [[*row[:-1], NOTHING] for row in rows]
        blocks.append(Table("Headline numbers of planted neurons", HEADS, rows, note, n_text=4))
    elif rows:
        note = (
            f"The paper: {papers.PSI}, {papers.PSI_SETTING}. It has another network, probe set and encoder, so that "
            "another number here is no failure to reproduce; a dash: it gives none. No headline counts without the "
            "figure beside it."
        )
        blocks.append(Table("Headline numbers beside the paper's", HEADS, rows, note, n_text=4))
    return Section("headline", _TITLE, blocks)


def _scored(source: Source) -> list[list[str]]:
    rows = source.rows("SELECT * FROM layer_summary")
    of = {(r["layer"], r["metric"], r["preset"], r["null_kind"], r["score"]): r for r in rows}

    def figure(
        metric: str, preset: str, kind: str | None = None, score: str | None = None, layer: str | None = None
    ) -> dict[str, Any]:
        nothing = {"value": None, "low": None, "high": None, "n": 0}
        return of.get((layer, metric, preset, kind, score), nothing)

    def auroc(preset: str, layer: str | None = None) -> str:
        return _figure(figure("auroc", preset, summary.AUROC_AGAINST[preset], "log_psi", layer))

    hard = "specific against one concept"
    found = [
        ["AUROC of log ψ, paper against rotation, whole sweep", auroc("paper"), f"{hard}: {auroc('specific')}",
         papers.PSI_AUROC]
    ]  # fmt: skip
    if source.layers:
        last = source.layers[-1]
        said = f"the same in the last layer, {layer_name(last)}"
        found.append([said, auroc("paper", last), f"{hard}: {auroc('specific', last)}", papers.PSI_AUROC])
    if len(source.layers) > 1:
        tau = figure("depth_tau", "paper", score="log_psi")
        beside = _figure(figure("depth_tau", "specific", score="log_psi"))
        found.append(["Kendall's tau of depth and log ψ, paper", _figure(tau), f"specific: {beside}",
                      papers.PSI_DEPTH])  # fmt: skip
    called, null = figure("called_frac", "specific"), figure("null_called_frac", "specific", "one_concept")
    found.append([f"neurons called polysemantic under specific at q < {source.alpha}",
                  f"{percent(called['value'])} of {count(called['n'])}",
                  f"null neurons of one concept called: {percent(null['value'])} of {count(null['n'])}",
                  NOTHING])  # fmt: skip
    p05 = figure("p05_frac", "specific")
    at = source.rows(
        "SELECT avg((specific_p < 0.05)::DOUBLE) AS share, count(*) AS n FROM null_neurons WHERE kind = 'one_concept' "
        "AND specific_p IS NOT NULL"
    )[0]
    found.append(["neurons with p < 0.05 under specific, not corrected", f"{percent(p05['value'])} of "
                  f"{count(p05['n'])}", f"null neurons of one concept: {percent(at['share'])} of {count(at['n'])}",
                  NOTHING])  # fmt: skip
    return found


def _figure(row: dict[str, Any]) -> str:
    return interval(row["value"], row["low"], row["high"])


def _swapped(source: Source) -> list[list[str]]:
    if not source.has("effects"):
        return []
    whole = next(r for r in source.swapped if r["layer"] is None and r["split"] == "all")
    at, beside = whole["contrasts"]["aligned-random"], whole["contrasts"]["aligned-non_aligned"]
    causal, both, null = (whole[c] for c in ("causal", "causal_specific", "null_p05"))
    return [
        ["patch swap: aligned − random, raw response", interval(at["mean"], at["low"], at["high"], 2),
         f"aligned − non-aligned: {interval(beside['mean'], beside['low'], beside['high'], 2)}", papers.PSI_SWAP],
        ["the same in standard deviations of the top responses",
         interval(at["mean_sd"], at["low_sd"], at["high_sd"], 2),
         f"aligned − non-aligned: {interval(beside['mean_sd'], beside['low_sd'], beside['high_sd'], 2)}", NOTHING],
        ["causally polysemantic, and p of S < 0.05 under specific",
         f"{percent_interval(both['mean'], both['low'], both['high'])} of {count(both['n'])}",
         f"causal whatever S says: {percent(causal['mean'])} of {count(causal['n'])}. The verdict has no null; of "
         f"another contrast, aligned − non-aligned, null neurons with p < 0.05: {percent(null['mean'])} of "
         f"{count(null['n'])}", NOTHING],
    ]  # fmt: skip


def _varied(source: Source) -> list[list[str]]:
    found = []
    records = sensitivity.variant_table(source.dataset)
    seeds = [r for r in records if r["vary"] == "seed"]
    beside = "no other seed was tried"
    if seeds:
        values = ", ".join(number(r["spearman"].get("log ψ paper", {}).get("estimate"), 2) for r in seeds)
        beside = f"another seed: {values}"
    for r in records:
        if r["vary"] in ("prompts", "encoder"):
            f = r["spearman"].get("log ψ paper", {})
            said = interval(f.get("estimate"), f.get("low"), f.get("high"), 2)
            what = f"Spearman of log ψ, paper, with other {r['vary']} ({visible(r['value'], 60)})"
            found.append([what, said, beside, f"{papers.PSI_TEXT_HEAD}, another text head"])
    return found


def _categorical(source: Source) -> Section:
    records = categorical.records(source.dataset) if source.has("categorical") else []
    whole = next((r for r in records if r["layer"] is None), None)
    if whole is None:
        return Section("headline", _TITLE, [Missing(unsummarised(source, "share of positive differences"))])
    of = whole["conditions"]
    actual = of[categorical.ACTUAL]

    def beside(name: str, shares: bool = True) -> str:
        said = []
        for condition, words in CONTROLS.items():
            if (row := of.get(condition)) is not None:
                said.append(f"{words}: {percent(row[name]) if shares else number(row[name], 2)}")
        return "; ".join(said) or NOTHING

    n, qualify = actual["n_neurons"], actual["n"]
    rows = [
        ["neurons that qualify, by their taken-clusters", f"{count(qualify)} of {count(n)}",
         "with random precursors: " + percent(of.get("precursors_random", {}).get("requalifying")) + " of them would",
         papers.CATEGORICAL_QUALIFY],
        ["share with a positive difference", _share(actual, "positive"), beside("positive"),
         papers.CATEGORICAL_POSITIVE],
        ["Kendall's tau of activation decile and mean proximity, pooled", _interval(actual, "tau"),
         beside("tau", False), papers.CATEGORICAL_TAU],
        ["mean share of the first principal component", _share(actual, "first"), beside("first"),
         papers.CATEGORICAL_FIRST],
        ["neurons with Kruskal-Wallis p < 0.05", _share(actual, "kruskal"), beside("kruskal"), NOTHING],
    ]  # fmt: skip
    gone = [r for c, r in of.items() if c != categorical.ACTUAL]
    verdicts = {v: sum(r["verdict"] == v for r in gone) for v in ("kept", "gone", "undecided", "no effect")}
    words = {"kept": "leave more than half of the share's excess over one half", "gone": "leave less than half of it",
             "undecided": "are undecided", "no effect": "have no effect to leave any of"}  # fmt: skip
    said = ", ".join(f"{v} {words[k]}" for k, v in verdicts.items() if v)
    note = (
        f"The paper: {papers.CATEGORICAL}, {papers.CATEGORICAL_SETTING}; its share of the first component is of one "
        "analysis, ours a mean over neurons. Controls break one thing each: where the share stays as high, the effect "
        "does not depend on what was broken. Intervals resample layers and token groups."
    )
    table = Table("Headline numbers beside their controls and the paper's", HEADS, rows, note, n_text=4)
    return Section(
        "headline", _TITLE, [table, Prose(f"Of {len(gone)} controls, {said}: the section on controls says which.")]
    )


CONTROLS = {
    "order": "order permuted",
    "precursors_matched": "other precursors, matched",
    "precursors_random": "random precursors",
    "tokens_same_frequency": "tokens replaced",
}
"""The method's controls, as they are named beside a headline."""


def _interval(row: dict[str, Any], name: str) -> str:
    return interval(row[name], row[name + "_low"], row[name + "_high"], 2)


def _share(row: dict[str, Any], name: str) -> str:
    return percent_interval(row[name], row[name + "_low"], row[name + "_high"])
