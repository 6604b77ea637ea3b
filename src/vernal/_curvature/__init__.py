"""Derivatives, eigenvalues and singular values.

`matrices` has derivatives of functions of a tree of parameters, `eigen` the users'
functions of a matrix. Beneath them: `linalg` decomposes a matrix or a Jacobian, `modes`
chooses forward or reverse mode.
"""

from .eigen import decompose, eigen_projection
from .linalg import (
    IndefiniteError,
    Matrix,
    Spectrum,
    after,
    as_real_square,
    column_norms,
    descending,
    equilibrated_eigh,
    matmul,
    of_jacobian,
    on_device,
    positive,
    refuse,
    refuse_non_finite,
    square_factor,
)
from .matrices import (
    Expansion,
    MatrixFree,
    checked_batch_size,
    expansion_of,
    gauss_newton,
    gauss_newton_matrix,
    gauss_newton_matvec,
    hessian,
    hessian_matvec,
    jacobian,
    jacobian_of,
    spectrum_of,
)
from .modes import (
    Flat,
    Mode,
    Subject,
    checked_mode,
    choose_mode,
    gauss_newton_products,
    gradient,
    hessian_matrix,
    hessian_product,
    in_reverse,
    jacobian_matrix,
    traced,
    transposed_product,
)
