// The normal distribution's integral, piecewise: what GELU multiplies its input with, where vectors can look up tables.
#pragma once

namespace fn {

constexpr int PIECES = 32;

// Polynomials in the distance from the piece's middle, from -1/2 to 1/2 of its width: degree d has coefficients
// [0] ... [d], each for all pieces.
struct Phi {
    float exact[5][PIECES]; // over [-5.5, 5.5]
    float rough[3][PIECES]; // over [-4, 4], for bf16
};
extern const Phi PHI;
constexpr float EXACT_RANGE = 5.5f, ROUGH_RANGE = 4.0f;
constexpr float SCALE = 15.99f; // of a half range: its ends round into the outermost pieces

} // namespace fn
