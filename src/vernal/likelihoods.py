"""Likelihoods of data: what `residuals` of a trainer may return."""

from ._likelihoods import (
    AbstractLikelihood as AbstractLikelihood,
    Gaussian as Gaussian,
    Poisson as Poisson,
    Robust as Robust,
)
