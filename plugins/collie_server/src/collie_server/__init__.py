"""An HTTP server for CoLLiE. This file only describes it: it costs neither torch nor pydantic."""

from collie_core.api import Component

HTTP = Component(
    build="collie_server.server:HttpServer",
    config="collie_server.http_config:HttpConfig",
    summary="chat and completions over HTTP, as OpenAI's interface has them",
)

__all__ = ["HTTP"]
