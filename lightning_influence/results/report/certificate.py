"""The certificate of an answer in plain words, for readers who know nothing of influence functions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_influence.results.diagnostics import Diagnostics

#: What the methods do, in one clause each; a method that a user registered is called by its name.
METHODS = {
    "auto": "EK-FAC factors of the curvature, corrected against the exact curvature in a space of training "
    "gradients, with further steps where they are needed",
    "ekfac": "EK-FAC, an approximation of the curvature layer by layer",
    "kfac": "K-FAC, a coarse approximation of the curvature layer by layer",
    "diagonal": "the diagonal of the curvature alone",
    "identity": "products of gradients, without any curvature",
    "hessian": "the exact Hessian of the training loss",
    "exact": "the exact Gauss-Newton matrix of the training loss",
    "block_ggn": "the exact Gauss-Newton matrix, layer by layer",
    "cg": "conjugate gradients with the curvature of the training loss",
    "minres": "MINRES with the curvature of the training loss",
    "astra": "ASTRA, a stochastic iteration with a preconditioner",
    "lissa": "LiSSA, a stochastic iteration",
}
# Chosen by hand: relative residuals up to which a ranking hardly changes, or keeps its strongest members.
_GOOD, _FAIR = 0.1, 0.4

Sentence = dict[str, str]


def say(text: str, tone: str = "") -> Sentence:
    """A sentence of the page.

    Args:
        text: the sentence.
        tone: ``"good"``, ``"fair"`` or ``"bad"`` where it judges, else empty.

    Returns:
        The sentence as the page takes it.
    """
    return {"text": text, "tone": tone}


def describe_certificate(diagnostics: Diagnostics) -> dict[str, Any]:
    """A section that says how scores came about and how far to trust them.

    Args:
        diagnostics: of the scores.

    Returns:
        The section: sentences, and everything that is known as a table.
    """
    sentences = [
        _describe_method(diagnostics),
        _describe_coverage(diagnostics),
        _describe_damping(diagnostics),
        *_describe_residuals(diagnostics),
        *_describe_models(diagnostics),
        say(
            "Scores are estimates of what training again without one example would do. They are most useful "
            "for ranking examples and for sums over groups; a single small score says little."
        ),
        *(say(warning, "fair") for warning in diagnostics.warnings),
    ]
    return build_certificate(sentences, diagnostics.facts())


def build_certificate(sentences: list[Sentence], facts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """A section of sentences and facts.

    Args:
        sentences: what :func:`say` returned.
        facts: names and values.

    Returns:
        The section.
    """
    return {
        "kind": "certificate",
        "id": "certificate",
        "title": "How far to trust it",
        "sentences": sentences,
        "facts": [list(fact) for fact in facts],
    }


def _describe_method(diagnostics: Diagnostics) -> Sentence:
    how = METHODS.get(diagnostics.method, f"the method {diagnostics.method!r}")
    where = f"checkpoint {diagnostics.checkpoint}" if diagnostics.checkpoint else "weights in memory"
    return say(f"The scores were computed with {how}, at the model's {where}.")


def _describe_coverage(diagnostics: Diagnostics) -> Sentence:
    share = diagnostics.parameters_covered
    text = f"They account for {share:.1%} of the parameters that were trained"
    if share > 0.95:
        return say(f"{text}.", "good")
    return say(f"{text}; influence by way of the others is not seen.", "fair" if share > 0.5 else "bad")


def _describe_damping(diagnostics: Diagnostics) -> Sentence:
    if not diagnostics.damping:
        return say("No damping was used.")
    origin = f" ({diagnostics.damping_origin})" if diagnostics.damping_origin else ""
    values = diagnostics.damping.values()
    low, high = min(values), max(values)
    spread = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    return say(
        f"Damping {spread}{origin} keeps directions about which the data say little from dominating. More "
        "damping makes scores smaller and more alike."
    )


def _describe_residuals(diagnostics: Diagnostics) -> list[Sentence]:
    residuals = diagnostics.residuals
    if residuals is None or not residuals.numel():
        return [
            say(
                "How exactly the underlying equations were solved was not measured. A method that solves "
                "them, such as auto, tells it for every query."
            )
        ]
    mean, worst = float(residuals.mean()), float(residuals.max())
    share = float((residuals <= _FAIR).float().mean())
    text = (
        f"The underlying equations were solved up to {mean:.1%} on average and {worst:.1%} for the worst "
        "query (0% would be exact)"
    )
    if worst <= _GOOD:
        return [say(f"{text}: the rankings hardly differ from those of the exact solution.", "good")]
    if worst <= _FAIR:
        return [
            say(
                f"{text}: the strongest examples stand out, their order may be another one.",
                "fair",
            )
        ]
    return [
        say(
            f"{text}: {share:.0%} of the queries are within {_FAIR:.0%}. Read the others with care, or ask "
            "again with a smaller tolerance or a larger budget.",
            "bad",
        )
    ]


def _describe_models(diagnostics: Diagnostics) -> list[Sentence]:
    models, agreement = diagnostics.extra.get("models"), diagnostics.extra.get("agreement")
    if not models or models == 1 or agreement is None:
        return []
    tone = "good" if agreement > 0.7 else "fair" if agreement > 0.3 else "bad"
    return [say(f"They are averages over {models} models, whose scores agree at {agreement:.2f} of 1.", tone)]
