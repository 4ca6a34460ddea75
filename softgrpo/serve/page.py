"""The page at `/`: a chat that shows what every token was mixed from."""

from __future__ import annotations

from html import escape

from softgrpo.report.build import asset, fill_page
from softgrpo.report.embed import embed_json
from softgrpo.serve.settings import ServeSettings
from softgrpo_engine import LLM, SoftParams

# The view of the tokens is that of the reports.
_SCRIPTS = ("dom.js", "token_view.js", "chat.js")


def chat_page(llm: LLM, settings: ServeSettings) -> str:
    """One file that asks nothing but this server."""
    soft = settings.soft or SoftParams()
    data = {
        "chat": bool(llm.tokenizer.chat_template),
        "context": llm.max_model_len,
        "key": settings.api_key is not None,
        "soft": {
            name: getattr(soft, name)
            for name in ("tau", "top_p", "top_k", "weight_floor", "temperature")
        },
    }
    parts = {
        "title": escape(settings.name),
        "style": asset("style.css") + asset("chat.css"),
        "data": embed_json(data),
        "script": "\n".join(asset(name) for name in _SCRIPTS),
    }
    return fill_page("chat.html", parts)
