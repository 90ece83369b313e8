from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
import torch
from jaxtyping import install_import_hook
from torch import nn
from torch.nn.modules import module as module_hooks

# Shapes that annotations name are checked wherever these modules run in the tests.
install_import_hook(
    ["captum_globenc.recording.records", "captum_globenc.contributions"],
    "beartype.beartype",
)
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_forward_hooks_with_kwargs",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def left_behind(model: nn.Module) -> list[str]:
    """Every trace that an attribution could leave on a model or on torch."""
    traces = [name for name in _GLOBAL_HOOKS if getattr(module_hooks, name)]
    for name, module in model.named_modules():
        traces += [f"{name}.{hooks}" for hooks in _HOOKS if getattr(module, hooks)]
    return traces


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    playwright = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        message = f"none of {', '.join(_BROWSERS)} is on the PATH"
        if os.environ.get("CI_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_html(browser, tmp_path):
    """Opens a page from a file, and checks that it asks and complains about nothing."""
    contexts, complaints, requests = [], [], []

    def open_page(html, **settings):
        file = tmp_path / f"page{len(contexts)}.html"
        file.write_text(html, encoding="utf-8")
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        assert requests[-1] == file.as_uri()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert len(requests) == len(contexts)
