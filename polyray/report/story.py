"""Story: what a report says, in order.

Which question it answers: *what did the sweep find, how sure is it, and what would one have to do to find it again?*
Place in the flow: `polyray report` has it written by `page.py` or `markdown.py`. Of a running, failed or empty run each
section says what is not there yet, and why.
"""

from polyray.report import cards, headline, language, overview, scores, studied
from polyray.report.content import Section, Story
from polyray.report.plain import count, network_name, visible
from polyray.report.source import Source


def tell(source: Source) -> Story:
    """All sections of a dataset's report.

    Raises:
        StoreError: a part of the dataset is gone or damaged.
    """
    sections = [overview.swept(source), headline.headline(source)]
    sections += _categorical(source) if source.is_categorical else _psi(source)
    sections += [cards.cards(source), overview.left_out(source), overview.provenance(source)]
    name = visible(network_name(source.run) or "a network", 80)
    is_planted = source.setting("plant") is not None
    of_status = overview.statuses(source).get(None, {})
    subtitle = (
        f"{count(sum(of_status.values()))} {'planted ' if is_planted else ''}neurons, {count(of_status.get('ok', 0))} "
        f"of them scored, in {len(source.layers)} layers · run {visible(source.run.get('run_id'))}"
    )
    title = f"Neurons planted on {name}" if is_planted else f"A census of {name}"
    return Story(title, subtitle, overview.state(source), sections)


def _psi(source: Source) -> list[Section]:
    sections = [
        scores.distributions(source),
        scores.aurocs(source),
        scores.depth(source),
        scores.components(source),
        studied.causes(source),
        studied.plants(source),
        studied.hangs_on(source),
    ]
    return [s for s in sections if s is not None]


def _categorical(source: Source) -> list[Section]:
    return [language.deciles(source), language.controls(source), language.components(source)]
