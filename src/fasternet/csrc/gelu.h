// What GELU is made of, piecewise, where a vector register holds a table: Phi(u) - 1/2, Phi the normal distribution.
#pragma once

namespace fn {

constexpr int PIECES = 16;

// Polynomials in the distance from a piece's middle, from -1/2 to 1/2 of its width; piece n lies around n of these.
// Degree d has coefficients [0] ... [d], each for all pieces.
struct Phi {
    alignas(64) float exact[5][PIECES]; // up to 5.5
    alignas(64) float rough[3][PIECES]; // up to 4, for bf16
};
extern const Phi PHI;
constexpr float EXACT_RANGE = 5.5f, ROUGH_RANGE = 4.0f;
constexpr float SCALE = 15.49f; // of a range: its end rounds into the last piece

} // namespace fn
