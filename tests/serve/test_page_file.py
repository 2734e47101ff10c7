"""The page's file: one piece that loads nothing, and that never makes markup of what a model or the server says."""

from __future__ import annotations

import re
from pathlib import Path

import mlx_lora

PAGE = (Path(mlx_lora.__file__).parent / "serve" / "page" / "index.html").read_text("utf-8")


def test_it_is_one_piece() -> None:
    """A policy with hashes lets one style and one script run; attributes with code or style it would refuse."""
    assert len(re.findall(r"<style\b", PAGE)) == len(re.findall(r"<script\b", PAGE)) == 1
    assert not re.search(r"<[^>]*\s(?:style|on\w+)=", PAGE.split("<script>")[0])
    assert not re.search(r"@import|url\(|<(?:iframe|img|object|embed|base|form[^>]*action)\b|\bsrc=", PAGE)


def test_it_loads_nothing() -> None:
    links = re.findall(r'(?:href|src)="([^"]*)"', PAGE)
    assert [link for link in links if not link.startswith("data:")] == []
    assert re.findall(r'\bcall\("([^"]*)"', PAGE) == ["v1/models", "v1/chat/completions"]
    assert len(re.findall(r"\bfetch\(", PAGE)) == 1


def test_it_makes_no_markup_of_text() -> None:
    markup = (
        r"(?:inner|outer|insertAdjacent)HTML|document\.write|createContextualFragment|DOMParser|\beval\(|Function\("
    )
    assert not re.search(markup, PAGE)


def test_it_stores_nothing() -> None:
    assert not re.search(r"localStorage|sessionStorage|indexedDB|document\.cookie|caches\.|serviceWorker", PAGE)


def test_every_part_that_the_script_looks_up_is_there() -> None:
    parts = re.findall(r'\bid="([^"]*)"', PAGE)
    assert len(parts) == len(set(parts))
    assert set(re.findall(r'\$\("([^"]*)"\)', PAGE)) <= set(parts)
