"""Derivatives, eigenvalues and singular values."""

from .eigen import (
    Matrix as Matrix,
    as_real_square as as_real_square,
    decompose as decompose,
    descending as descending,
    eigen_projection as eigen_projection,
    equilibrated_eigh as equilibrated_eigh,
    refuse as refuse,
    refuse_non_finite as refuse_non_finite,
)
from .linalg import matmul as matmul
from .matrices import (
    MatrixFree as MatrixFree,
    Product as Product,
    checked_batch_size as checked_batch_size,
    gauss_newton as gauss_newton,
    gauss_newton_matrix as gauss_newton_matrix,
    gauss_newton_matvec as gauss_newton_matvec,
    hessian as hessian,
    hessian_matrix as hessian_matrix,
    hessian_matvec as hessian_matvec,
    jacobian as jacobian,
    jacobian_of as jacobian_of,
    spectrum_of as spectrum_of,
)
from .modes import (
    Flat as Flat,
    Mode as Mode,
    Subject as Subject,
    checked_mode as checked_mode,
    choose_mode as choose_mode,
    columns as columns,
    gauss_newton_products as gauss_newton_products,
    gradient as gradient,
    hessian_product as hessian_product,
    in_reverse as in_reverse,
    jacobian_matrix as jacobian_matrix,
    traced as traced,
)
from .singular import (
    Spectrum as Spectrum,
    column_norms as column_norms,
    of_jacobian as of_jacobian,
    positive as positive,
    square_factor as square_factor,
)
