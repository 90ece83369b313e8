"""The command line: ``captum-globenc``.

Torch and transformers take seconds to import, so they are imported where a command has
to run a model: the help, the table of families and most mistakes are answered at once.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from captum_globenc import __version__, demo
from captum_globenc.catalogue import (
    DEFAULT_LOCAL,
    DEFAULT_METHODS,
    LOCAL_SCORES,
    MEASURES,
    METHODS,
    PRESETS,
    check_measures,
    check_methods,
)
from captum_globenc.comparison.checks import (
    check_model_name,
    check_text,
    class_index,
    labels_in,
)
from captum_globenc.errors import GlobEncError, InputError, named

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from captum_globenc.comparison.explanation import Explanation
    from captum_globenc.support import Report

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Paragraphs of one line each: the help keeps their ends.
# Code that comes with a model is never run.
_SAFE: dict[str, Any] = {"trust_remote_code": False}

_EXAMPLES = """
[bold]Examples[/]

  captum-globenc explain "A lovely film for the holiday season."

  captum-globenc explain "Too long and too loud." --target positive

  captum-globenc explain "Fine." --methods globenc,saliency --local N_RES

  captum-globenc explain "Fine." --model path/to/classifier --html fine.html

  captum-globenc explain --json -- "-1 out of 10." > scores.json
"""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"captum-globenc {__version__}")
        raise typer.Exit


@app.callback(epilog=_EXAMPLES)
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            metavar="",
            help="Show the version.",
        ),
    ] = False,
) -> None:
    """Token attribution for transformers."""


@app.command(epilog=_EXAMPLES)
def explain(
    text: Annotated[
        str,
        typer.Argument(
            metavar="TEXT",
            help="The sentence to explain; after -- where it begins with a dash.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_NAME",
            help="Folder or Hugging Face name of a sequence classifier "
            "(default: the film-review classifier that ships with the package).",
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help=f"Any of {', '.join(METHODS)}.",
        ),
    ] = ",".join(DEFAULT_METHODS),
    local: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"The local score of globenc: {', '.join(LOCAL_SCORES[:-1])} or "
            f"{LOCAL_SCORES[-1]}.",
        ),
    ] = DEFAULT_LOCAL,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL_OR_INDEX",
            help="The class to explain (default: the predicted one).",
        ),
    ] = None,
    truncate: Annotated[
        bool,
        typer.Option(
            "--truncate",
            metavar="",
            help="Cut a text that is too long for the model.",
        ),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write a standalone page, to follow tokens through the layers.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print JSON and nothing else.")
    ] = False,
) -> None:
    """Show which tokens of TEXT matter to a classifier, by several methods."""
    if html is not None:
        _check_writable(html)
    try:
        check_methods(_names(methods), local)
        check_text(text)
        _check_model(model, target)
    except GlobEncError as error:
        _fail(str(error))
    from captum_globenc.comparison.explanation import explain as explain_text

    _mute_transformers()
    try:
        explanation = explain_text(
            *_load(model),
            text,
            _names(methods),
            local=local,
            target=target,
            truncate=truncate,
            decompose=html is not None,
        )
    except GlobEncError as error:
        _fail(str(error))
    if html is not None:
        _write_page(explanation, html)
    if as_json:
        typer.echo(json.dumps(explanation.to_dict(), indent=2, allow_nan=False))
    else:
        from captum_globenc.visualization import to_terminal

        _show(to_terminal(explanation))
    if html is not None:
        typer.echo(f"Wrote {html}", err=as_json)


_BENCHMARK_EXAMPLES = """
[bold]Examples[/]

  captum-globenc benchmark

  captum-globenc benchmark --model path/to/classifier --data reviews.csv --label-column label --methods globenc,integrated_gradients,saliency --limit 500 --output report/

  captum-globenc benchmark --preset paper --output report/
"""  # noqa: E501


@app.command(epilog=_BENCHMARK_EXAMPLES)
def benchmark(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_NAME",
            help="Folder or Hugging Face name of a sequence classifier "
            "(default: the film-review classifier that ships with the package).",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Texts: .csv, .tsv, .jsonl, .parquet or .txt, or "
            "hub:NAME[:CONFIG][:SPLIT] (default: 200 held-out sentences that ship "
            "with the package).",
        ),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where texts are (text).")
    ] = None,
    pair_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where second sentences are.")
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Where labels are, for the accuracy."),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="; ".join(f"{name}: {p.summary}" for name, p in PRESETS.items()) + ".",
        ),
    ] = "default",
    methods: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Instead of the preset's; see explain."),
    ] = None,
    measures: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help=f"Instead of the preset's: {', '.join(MEASURES)}.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="The first N texts (default: all).")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="So many texts at once.")
    ] = 16,
    processes: Annotated[
        int, typer.Option(metavar="N", help="So many processes at once.")
    ] = 1,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write tables, figures and a page here. An interrupted run goes on "
            "from what it has saved.",
        ),
    ] = None,
) -> None:
    """Measure attribution methods side by side on a classifier's texts."""
    try:
        from captum_globenc import evaluation
        from captum_globenc.evaluation.arguments import check_counts
    except ImportError as error:
        _fail(str(error))
    try:
        chosen = named(PRESETS, preset, "preset")
        own_data = data or chosen.data
        check_methods(_names(methods) or chosen.methods)
        check_measures(_names(measures) or chosen.measures)
        check_counts(limit, batch_size, processes)
        if own_data is not None:
            evaluation.read_examples(own_data)  # Opens nothing yet.
        _check_model(model or chosen.model)
    except GlobEncError as error:
        _fail(str(error))
    _mute_transformers()
    try:
        result = evaluation.benchmark(
            *_load(model or chosen.model),
            own_data or _shipped_sentences(),
            _names(methods) or chosen.methods,
            measures=_names(measures) or chosen.measures,
            per_layer=chosen.per_layer,
            text_column=text_column or (chosen.text_column if not data else "text"),
            pair_column=pair_column or (chosen.pair_column if not data else None),
            # A file has labels where it is said; those of a preset are known.
            label_column=label_column or (None if data else chosen.label_column),
            limit=limit,
            batch_size=batch_size,
            processes=processes,
            output=output,
        )
    except GlobEncError as error:
        _fail(str(error))
    from captum_globenc.evaluation.terminal import to_terminal

    _show(to_terminal(result))
    if output is not None:
        typer.echo(f"Wrote {output / 'index.html'}")


@app.command()
def models(
    check: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_NAME",
            help="Load this model and see how well its recorded parts rebuild each "
            "layer, on random inputs.",
        ),
    ] = None,
) -> None:
    """List the supported families, or check a model of one."""
    from rich.table import Table

    if check is None:
        from captum_globenc.encoders.table import rows

        table = Table("Family")
        # Whole, whatever the width: it is what one writes in code.
        table.add_column("model_type or class", overflow="fold")
        table.add_column("Norms")
        table.add_column("transformers from")
        for row in rows():
            table.add_row(row.title, row.name, row.norms, row.since)
        _show(table)
        return
    fine = True
    try:
        _check_model(check)
        from captum_globenc import support

        _mute_transformers()
        for encoder in _load_encoders(check):
            fine = _show_check(support.check_model(encoder)) and fine
    except GlobEncError as error:
        _fail(str(error))
    if not fine:
        raise typer.Exit(1)


def _show_check(report: Report) -> bool:
    """Print a report; return whether all layers are rebuilt."""
    from rich.table import Table

    table = Table("Layer", "Part rebuilt least well", "Off by", "Allowed")
    for layer, fit in report.layers.items():
        table.add_row(layer, fit.part, f"{fit.deviation:.1e}", f"{fit.limit:.0e}")
    _show(table)
    good = sum(fit.is_within_tolerance for fit in report.layers.values())
    all_of = "all " if good == len(report.layers) else f"{good} of "
    typer.echo(
        f"{report.family}: {all_of}{len(report.layers)} layers are rebuilt, in "
        f"{report.seconds:.2f} s."
    )
    return good == len(report.layers)


def _load_encoders(name: str) -> list[PreTrainedModel]:
    """The model of this name; an encoder-decoder's encoder; the towers of CLIP."""
    import transformers

    with _loading(name) as source:
        config = transformers.AutoConfig.from_pretrained(name, **_SAFE, **source)
        # As it was saved, where that is known: some have no class without a head.
        saved = next(iter(config.architectures or []), "")
        kind = getattr(transformers, saved, None)
        model, report = (kind or transformers.AutoModel).from_pretrained(
            name,
            dtype="float32",
            output_loading_info=True,
            adapter_kwargs=source,
            **({} if kind else _SAFE),
            **source,
        )
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"model {name!r} lacks weights: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}."
        )
    if config.is_encoder_decoder:
        model = model.get_encoder()
    towers = [getattr(model, part, None) for part in ("text_model", "vision_model")]
    found = [tower for tower in towers if tower is not None]
    return [part.eval() for part in (found if len(found) > 1 else [model])]


def _check_model(name: str | None, target: str | None = None) -> None:
    """Before torch is imported: what the files of a model say of a mistake.

    Raises:
        InputError: there is no such model, or no such class in it.
    """
    folder: Traversable = demo.FOLDER if name is None else Path(name)
    if name is not None:
        check_model_name(name)
        if not folder.is_dir() and not _is_cached(name) and not _hub_knows(name):
            raise _no_such_model(name)
    labels = labels_in(folder)
    if target is not None and labels is not None:
        class_index(target, labels)


def _names(given: str | None) -> list[str]:
    return [name.strip() for name in (given or "").split(",") if name.strip()]


def _shipped_sentences() -> list[tuple[str, int]]:
    return demo.held_out_sentences()


def _load(
    name: str | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The classifier of this name and its tokenizer.

    Raises:
        InputError: there is none, or it is no trained classifier.
    """
    if name is None:
        return demo.load_classifier()
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with _loading(name) as source:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype="float32",
            output_loading_info=True,
            adapter_kwargs=source,
            **_SAFE,
            **source,
        )
        tokenizer = AutoTokenizer.from_pretrained(name, **_SAFE, **source)
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"model {name!r} is no trained sequence classifier: it has no weights for "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}."
        )
    # Without tokenizer files transformers makes one that knows the special tokens only.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise InputError(
            f"model {name!r} comes without a tokenizer: it knows {len(tokenizer)} "
            f"tokens, and the model {model.config.vocab_size}."
        )
    return model.eval(), tokenizer


@contextmanager
def _loading(name: str) -> Iterator[dict[str, bool]]:
    """Where to look for a model, for ``from_pretrained`` and its adapters.

    Raises:
        InputError: it cannot be loaded, in one sentence.
    """
    here = Path(name).is_dir()
    try:
        yield {"local_files_only": here or not _hub_knows(name)}
    except Exception as error:  # a folder can be wrong in any way
        if not here and isinstance(error, OSError):
            raise _no_such_model(name) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"model {name!r} cannot be loaded: {reason}") from error


def _no_such_model(name: str) -> InputError:
    return InputError(
        f"model {name!r}: there is no such folder, and the Hugging Face hub has no "
        "such model or cannot be reached."
    )


def _is_cached(name: str) -> bool:
    """Whether a model of the hub has been downloaded, in part at least."""
    from huggingface_hub import try_to_load_from_cache

    configs = ("config.json", "adapter_config.json")
    try:
        found = [try_to_load_from_cache(name, config) for config in configs]
    except ValueError:  # No model can have this name.
        return False
    return any(isinstance(path, str) for path in found)


@functools.cache
def _hub_knows(name: str) -> bool:
    """Whether the hub answers for this model, asked once.

    Without a network transformers would ask again and again for half a minute.
    """
    from huggingface_hub import model_info

    try:
        model_info(name, timeout=10)
    except Exception:  # whatever it is, the model can still be in the cache
        return False
    return True


def _mute_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _check_writable(path: Path) -> None:
    """Before any work: a page that cannot be written would be lost with it."""
    if path.is_dir() or not path.parent.is_dir():
        _fail(f"cannot write {str(path)!r}: it is no file in a folder that exists.")


def _write_page(explanation: Explanation, path: Path) -> None:
    from captum_globenc.visualization import to_html

    try:
        path.write_text(to_html(explanation), encoding="utf-8")
    except OSError as error:
        _fail(f"cannot write {str(path)!r}: {error.strerror}.")


def _show(tables: RenderableType) -> None:
    from rich.console import Console

    # Where the encoding lacks a character of the text, a "?" is better than an error.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    Console().print(tables)


def _fail(message: str) -> NoReturn:
    """End with one sentence and the exit code of bad input."""
    typer.echo(f"captum-globenc: {message}", err=True)
    raise typer.Exit(2)
