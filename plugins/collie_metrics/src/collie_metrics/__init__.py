"""Metrics for CoLLiE. This file only describes them: it costs neither torch nor pydantic, nor the libraries below."""

from collie_core.api import Component, MetricCan

ACCURACY = Component(
    build="collie_metrics.accuracy:Accuracy",
    summary="share of the choices that are right",
    can=MetricCan(reads="choices", higher_is_better=True),
)
BLEU = Component(
    build="collie_metrics.bleu:Bleu",
    config="collie_metrics.bleu_config:BleuConfig",
    summary="corpus BLEU from 0 to 100, through sacrebleu",
    can=MetricCan(reads="texts", higher_is_better=True),
)
CHRF = Component(
    build="collie_metrics.chrf:Chrf",
    config="collie_metrics.chrf_config:ChrfConfig",
    summary="corpus chrF or chrF++ from 0 to 100, through sacrebleu",
    can=MetricCan(reads="texts", higher_is_better=True),
)
DECODE = Component(
    build="collie_metrics.decode:Decode",
    config="collie_metrics.decode_config:DecodeConfig",
    summary="a few answers beside their references, and how long answers are",
    can=MetricCan(reads="texts"),
)
EXACT_MATCH = Component(
    build="collie_metrics.exact_match:ExactMatch",
    config="collie_metrics.exact_match_config:ExactMatchConfig",
    summary="share of the answers that equal a reference, normalised as asked",
    can=MetricCan(reads="texts", higher_is_better=True),
)
F1 = Component(
    build="collie_metrics.f1:F1",
    config="collie_metrics.f1_config:F1Config",
    summary="precision, recall and F1 of choices: micro, macro and weighted",
    can=MetricCan(reads="choices", higher_is_better=True),
)
NUMERIC_MATCH = Component(
    build="collie_metrics.numeric_match:NumericMatch",
    config="collie_metrics.numeric_match_config:NumericMatchConfig",
    summary="share of the answers with the right number, as GSM8K writes them",
    can=MetricCan(reads="texts", higher_is_better=True),
)
ROUGE = Component(
    build="collie_metrics.rouge:Rouge",
    config="collie_metrics.rouge_config:RougeConfig",
    summary="ROUGE-1, -2, -L and -Lsum from 0 to 1, through rouge-score",
    can=MetricCan(reads="texts", higher_is_better=True),
)
TOKEN_ACCURACY = Component(
    build="collie_metrics.token_accuracy:TokenAccuracy",
    summary="share of the target tokens to which the model gives the highest probability",
    can=MetricCan(reads="token_ids", higher_is_better=True),
)

__all__ = [
    "ACCURACY",
    "BLEU",
    "CHRF",
    "DECODE",
    "EXACT_MATCH",
    "F1",
    "NUMERIC_MATCH",
    "ROUGE",
    "TOKEN_ACCURACY",
]
