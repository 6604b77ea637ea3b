"""Derivatives, eigenvalues and singular values.

`matrices` and `matvec` have the users' functions of a tree of parameters, `eigen` those
of a matrix. Beneath them: `flat` differentiates with respect to a flat vector, `modes`
chooses forward or reverse mode, `singular` decomposes a Jacobian and `linalg` a matrix.
"""

from .eigen import decompose as decompose, eigen_projection as eigen_projection
from .flat import (
    checked_batch_size as checked_batch_size,
    gauss_newton_matrix as gauss_newton_matrix,
    hessian_matrix as hessian_matrix,
    jacobian_of as jacobian_of,
    spectrum_of as spectrum_of,
)
from .linalg import (
    Matrix as Matrix,
    as_real_square as as_real_square,
    descending as descending,
    equilibrated_eigh as equilibrated_eigh,
    matmul as matmul,
    refuse as refuse,
    refuse_non_finite as refuse_non_finite,
)
from .matrices import (
    gauss_newton as gauss_newton,
    hessian as hessian,
    jacobian as jacobian,
)
from .matvec import (
    MatrixFree as MatrixFree,
    Product as Product,
    gauss_newton_matvec as gauss_newton_matvec,
    hessian_matvec as hessian_matvec,
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
