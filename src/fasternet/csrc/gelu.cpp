#include "gelu.h"

#include <cmath>

namespace fn {
namespace {

// Interpolate at the Chebyshev nodes of every piece: all but the best polynomial of its degree.
template <int DEGREE> void interpolate(float (&to)[DEGREE + 1][PIECES], double width) {
    to[0][PIECES - 1] = 0.5f;
    for (int piece = 0; piece < PIECES - 1; ++piece) {
        double node[DEGREE + 1], newton[DEGREE + 1], sum[DEGREE + 1] = {};
        for (int i = 0; i <= DEGREE; ++i) {
            node[i] = 0.5 * std::cos(M_PI * (i + 0.5) / (DEGREE + 1));
            newton[i] = 0.5 * std::erf((node[i] + piece) * width * M_SQRT1_2);
        }
        for (int order = 1; order <= DEGREE; ++order)
            for (int i = DEGREE; i >= order; --i)
                newton[i] = (newton[i] - newton[i - 1]) / (node[i] - node[i - order]);
        for (int i = DEGREE; i >= 0; --i) { // Horner, in coefficients
            for (int k = DEGREE; k > 0; --k)
                sum[k] = sum[k - 1] - node[i] * sum[k];
            sum[0] = newton[i] - node[i] * sum[0];
        }
        for (int i = 0; i <= DEGREE; ++i)
            to[i][piece] = float(sum[i]);
    }
}

Phi create() {
    Phi phi{};
    interpolate<4>(phi.exact, double(EXACT_WIDTH));
    interpolate<2>(phi.rough, double(ROUGH_WIDTH));
    return phi;
}

} // namespace

const Phi PHI = create();

} // namespace fn
