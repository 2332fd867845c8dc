"""Descriptions of the servers, and their section."""

from typing import Literal

from pydantic import Field

from collie_core.api import Component, ServerConfig


def _component(attribute: str) -> Component:
    return Component(
        f"collie_mutants.plain_server:{attribute}", f"collie_mutants.servers:{attribute}Config", "a mutant"
    )


class PlainConfig(ServerConfig):
    port: int = Field(8000, ge=0, le=65535, description="0: any free one.")


class TidiesUpConfig(PlainConfig):
    type: Literal["tidies-up"] = "tidies-up"


class TerseConfig(PlainConfig):
    type: Literal["terse"] = "terse"


class CrashesOnRubbishConfig(PlainConfig):
    type: Literal["crashes-on-rubbish"] = "crashes-on-rubbish"


class EndlessConfig(PlainConfig):
    type: Literal["endless"] = "endless"


class MixesUpConfig(PlainConfig):
    type: Literal["mixes-up"] = "mixes-up"


class EasilyOffendedConfig(PlainConfig):
    type: Literal["easily-offended"] = "easily-offended"


class StaysConfig(PlainConfig):
    type: Literal["stays"] = "stays"


class AsksByItselfConfig(PlainConfig):
    type: Literal["asks-by-itself"] = "asks-by-itself"


TIDIES_UP = _component("TidiesUp")
TERSE = _component("Terse")
CRASHES_ON_RUBBISH = _component("CrashesOnRubbish")
ENDLESS = _component("Endless")
MIXES_UP = _component("MixesUp")
EASILY_OFFENDED = _component("EasilyOffended")
STAYS = _component("Stays")
ASKS_BY_ITSELF = _component("AsksByItself")
