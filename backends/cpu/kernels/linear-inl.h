// The matrix kernels, written once on top of a few vector operations and compiled for every instruction set but scalar.
//
// Before including this, a file of kernels/isa/ defines in an unnamed namespace inside edgeq:
//
//   lanes                     32-bit lanes of a vector
//   row_vectors, tile_tokens  the register block of gemm: row_vectors * lanes rows by tile_tokens tokens
//   gemv_tokens               so many tokens at most share one reading of the weights in gemv
//   gemv_block_rows(tokens)   rows that gemv takes in turns
//   prefetch_locality         of the weights, as __builtin_prefetch takes it: 0 is past the second-level cache
//   signed_bytes              whether dot8 takes codes - 128 (there is no unsigned by signed product of full range)
//   F, I, B                   vectors of float, int32, bytes
//   f_zero f_set f_load f_store f_add f_mul f_max f_abs f_fma(a, b, c) = a * b + c, f_sum, f_max_lane
//   f_sums(v)                 lane i = f_sum(v[i]), to the bit
//   f_load_some, f_store_some(p, v, n)  the first n lanes only, the others zero (n may be negative or too large)
//   f_widen(p, type, i)       lanes values from index i of an array of `type`, as float
//   f_e4m3(p, v)              2 * lanes bytes of type e4m3 to v[0] and v[1] as float, divided by 256
//   f_units(p, shift, n)      float16 p[i >> shift] in lane i, for the first n lanes (n positive); shift 2, 3 or 4
//   f_widen_some(p, type, i, n)  the first n of them, the others zero (n may be negative or too large)
//   f_store_int8(p, v)        lanes bytes: v rounded to nearest even
//   i_zero i_set i_float
//   i_start<n>(p)             128 p[0] in the first of lanes / n lanes, then 128 p[1] ...; the others zero
//   b_load(p)                 4 * lanes bytes
//   Codes, load_codes(p)      4 * lanes activation codes of one token, as dot and dot8 like to have them
//   unpack<bits>(p)           4 * lanes codes (minus 128 for 8 bits and signed_bytes); reads no byte beyond theirs
//   nibbles(p, low, high)     4 * lanes bytes of 4-bit codes: the even ones, the odd ones
//   quarters(p, v)            4 * lanes bytes of 2-bit codes: v[0] those that are 0 modulo 4, v[1] ... v[3]
//   look_up<mode>(v)          4-bit codes -> table_codes<mode>[code] (minus 128 for iq4 and signed_bytes)
//   dot(acc, w, a)            acc + sums of 4 (or, where signed_bytes, any) neighbouring products; codes below 64
//   dot8(acc, w, a)           the same for 8-bit codes
//   dot_apart(acc, w, a)      dot, always of 4 neighbouring products
//   dot_group<bits, tokens>(codes, distance, q, stride, group, d)  gemm's inner loop: to d[v][t], in lane i, the
//                             products of a group's codes of row v * lanes + i, in the order that transpose leaves them
//                             in, row vectors `distance` bytes apart, with those of token t, `stride` bytes apart;
//                             codes of 8 bits, of 6, or (bits = 5) of fewer. dot-rows-inl.h defines it by
//   Codes16, load_codes16(p)  16 activation codes of one token, as dot_rows likes to have them
//   dot_rows<bits>(acc, w, a) acc + every lane's own 4 bytes of w[0], ..., w[3] times the 16 of a
//   f_spread<n>(p, g)         lanes / n times p[g], then p[g + 1], ..., of sixteen aligned p; n up to lanes
//   transpose(p, n, out)      lanes rows of 4 * lanes bytes, n bytes apart: the first 4 bytes of every row, then the
//                             next 4 ... (or as many as the set's dot_group takes from a row at a time)
//   transposes_nibbles        whether there is transpose_nibbles<4>(p, n, out): what transpose makes of 8 * lanes codes
//   of
//                             lanes rows, from rows of 4-bit codes n bytes apart
//   f_transpose(p, n, out)    lanes rows of lanes floats, n floats apart, transposed
#pragma once

#include "kernels/activations-inl.h"
#include "kernels/gemv-inl.h"

#include "kernels/gemm-inl.h"
