"""Output files that are whole or not there: `ssmamba_models.output`, which lies below all layers, by its usual name."""

from ssmamba_models.output import check_output, is_unfinished, remove_unfinished, set_usual_mode, whole_file

__all__ = ["check_output", "is_unfinished", "remove_unfinished", "set_usual_mode", "whole_file"]
