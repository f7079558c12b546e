// What GELU is made of, piecewise, where a vector register holds a table: Phi(u) - 1/2, Phi the normal distribution.
#pragma once

namespace fn {

constexpr int PIECES = 16;

// Polynomials in the distance from a piece's middle, from -1/2 to 1/2 of its width; piece n lies around n of these, and
// the last is 1/2 for all that lies beyond. Degree d has coefficients [0] ... [d], each for all pieces.
struct Phi {
    alignas(64) float exact[5][PIECES];
    alignas(64) float rough[3][PIECES]; // for bf16
};
extern const Phi PHI;
constexpr float EXACT_WIDTH = 5.5f / 14.5f, ROUGH_WIDTH = 4.2f / 14.5f; // of a piece

} // namespace fn
