// Register blocks for Advanced SIMD, in assembly, because with intrinsics compilers spill accumulators or spend a
// quarter of the instructions on moves and addresses. Products take their broadcast operand from a lane of a
// register, so that one load serves four rows or four steps. The accumulators are v8 to v31 and v0 to v7 hold
// operands: all 32.
//
// PRODUCT(acc, b, a, lane) is the text of one product of four lanes: LGNET_FMLA of floats, LGNET_BFDOT of bf16 pairs.
// A unit (float or pair) has 4 bytes in both. The macros are bodies of the functions of neon.h and neon_bf16.h and
// use their parameters.
#pragma once

// clang-format off: the macros' lines are aligned by what they compute

#define LGNET_FMLA(acc, b, a, lane) "fmla v" #acc ".4s, v" #b ".4s, v" #a ".s[" #lane "]\n"
#define LGNET_BFDOT(acc, b, a, lane) "bfdot v" #acc ".4s, v" #b ".8h, v" #a ".2h[" #lane "]\n"
#define LGNET_NEON_CLOBBERS                                                                                      \
  "memory", "cc", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14", \
      "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", "v29",   \
      "v30", "v31"

// --- convolution: up to 6 rows x 4 vectors; a in v0 to v5, two vectors of b in v6 and v7 ---

#define LGNET_NEON_PAIR(PRODUCT, acc0, acc1, row, lane) PRODUCT(acc0, 6, row, lane) PRODUCT(acc1, 7, row, lane)
#define LGNET_NEON_LEFT_4(PRODUCT, lane)    \
  LGNET_NEON_PAIR(PRODUCT, 8, 9, 0, lane)   \
  LGNET_NEON_PAIR(PRODUCT, 12, 13, 1, lane) \
  LGNET_NEON_PAIR(PRODUCT, 16, 17, 2, lane) LGNET_NEON_PAIR(PRODUCT, 20, 21, 3, lane)
#define LGNET_NEON_LEFT_5(PRODUCT, lane) LGNET_NEON_LEFT_4(PRODUCT, lane) LGNET_NEON_PAIR(PRODUCT, 24, 25, 4, lane)
#define LGNET_NEON_LEFT_6(PRODUCT, lane) LGNET_NEON_LEFT_5(PRODUCT, lane) LGNET_NEON_PAIR(PRODUCT, 28, 29, 5, lane)
#define LGNET_NEON_RIGHT_4(PRODUCT, lane)   \
  LGNET_NEON_PAIR(PRODUCT, 10, 11, 0, lane) \
  LGNET_NEON_PAIR(PRODUCT, 14, 15, 1, lane) \
  LGNET_NEON_PAIR(PRODUCT, 18, 19, 2, lane) LGNET_NEON_PAIR(PRODUCT, 22, 23, 3, lane)
#define LGNET_NEON_RIGHT_5(PRODUCT, lane) LGNET_NEON_RIGHT_4(PRODUCT, lane) LGNET_NEON_PAIR(PRODUCT, 26, 27, 4, lane)
#define LGNET_NEON_RIGHT_6(PRODUCT, lane) LGNET_NEON_RIGHT_5(PRODUCT, lane) LGNET_NEON_PAIR(PRODUCT, 30, 31, 5, lane)
#define LGNET_NEON_CONV_STEP(PRODUCT, R, lane)                                                                     \
  "ldp q6, q7, [%[b]], #32\n" LGNET_NEON_LEFT_##R(PRODUCT, lane) "ldp q6, q7, [%[b]], #32\n" LGNET_NEON_RIGHT_##R( \
      PRODUCT, lane)

// Loads of the rows' next units: four (q, #16) or one (s, #4).
#define LGNET_NEON_ROWS_4(size, bytes)                                                                   \
  "ldr " size "0, [%[a0]], " bytes "\nldr " size "1, [%[a1]], " bytes "\nldr " size "2, [%[a2]], " bytes \
  "\nldr " size "3, [%[a3]], " bytes "\n"
#define LGNET_NEON_ROWS_5(size, bytes) LGNET_NEON_ROWS_4(size, bytes) "ldr " size "4, [%[a4]], " bytes "\n"
#define LGNET_NEON_ROWS_6(size, bytes) LGNET_NEON_ROWS_5(size, bytes) "ldr " size "5, [%[a5]], " bytes "\n"

// Moves a row of accumulators from (ldp) or to (stp) memory.
#define LGNET_NEON_MOVE(op, p, v0, v1, v2, v3)                                                         \
  op " q" #v0 ", q" #v1 ", [%[" p "]]\n" op " q" #v2 ", q" #v3 ", [%[" p "], #32]\nadd %[" p "], %[" p \
     "], "                                                                                             \
     "%[c_row]\n"
#define LGNET_NEON_MOVE_4(op, p)       \
  LGNET_NEON_MOVE(op, p, 8, 9, 10, 11) \
  LGNET_NEON_MOVE(op, p, 12, 13, 14, 15) LGNET_NEON_MOVE(op, p, 16, 17, 18, 19) LGNET_NEON_MOVE(op, p, 20, 21, 22, 23)
#define LGNET_NEON_MOVE_5(op, p) LGNET_NEON_MOVE_4(op, p) LGNET_NEON_MOVE(op, p, 24, 25, 26, 27)
#define LGNET_NEON_MOVE_6(op, p) LGNET_NEON_MOVE_5(op, p) LGNET_NEON_MOVE(op, p, 28, 29, 30, 31)

#define LGNET_NEON_CONV_ROWS(PRODUCT, R) \
  __asm__ volatile(LGNET_NEON_MOVE_##R("ldp", "from")                                                              \
                   "cbz %[fours], 2f\n"                                                                            \
                   "1:\n" LGNET_NEON_ROWS_##R("q", "#16")                                                          \
                   LGNET_NEON_CONV_STEP(PRODUCT, R, 0) LGNET_NEON_CONV_STEP(PRODUCT, R, 1)                         \
                   LGNET_NEON_CONV_STEP(PRODUCT, R, 2) LGNET_NEON_CONV_STEP(PRODUCT, R, 3)                         \
                   "subs %[fours], %[fours], #1\nb.ne 1b\n"                                                        \
                   "2:\ncbz %[ones], 4f\n"                                                                         \
                   "3:\n" LGNET_NEON_ROWS_##R("s", "#4") LGNET_NEON_CONV_STEP(PRODUCT, R, 0)                       \
                   "subs %[ones], %[ones], #1\nb.ne 3b\n"                                                          \
                   "4:\n" LGNET_NEON_MOVE_##R("stp", "to")                                                         \
                   : [a0] "+r"(rows[0]), [a1] "+r"(rows[1]), [a2] "+r"(rows[2]), [a3] "+r"(rows[3]),               \
                     [a4] "+r"(rows[4]), [a5] "+r"(rows[5]), [b] "+r"(b), [from] "+r"(from), [to] "+r"(to),        \
                     [fours] "+r"(fours), [ones] "+r"(ones)                                                        \
                   : [c_row] "r"(c_bytes)                                                                          \
                   : LGNET_NEON_CLOBBERS)

#define LGNET_NEON_CONV_BLOCK(PRODUCT)                                         \
  const Unit* rows[6];                                                         \
  for (int r = 0; r < 6; ++r) rows[r] = a + (r < R ? r : 0) * a_row;           \
  if (!accumulate) {                                                           \
    for (int r = 0; r < R; ++r) {                                              \
      for (int m = 0; m < CONV_NV; ++m) store(c + r * c_row + m * W, set1(0)); \
    }                                                                          \
  }                                                                            \
  float *from = c, *to = c;                                                    \
  int64_t fours = depth / 4, ones = depth % 4;                                 \
  const int64_t c_bytes = 4 * c_row;                                           \
  if constexpr (R == 6) LGNET_NEON_CONV_ROWS(PRODUCT, 6);                      \
  if constexpr (R == 5) LGNET_NEON_CONV_ROWS(PRODUCT, 5);                      \
  if constexpr (R == 4) LGNET_NEON_CONV_ROWS(PRODUCT, 4);

// --- attention: 4 rows x 6 vectors ---

#define LGNET_NEON_CLEAR(v) "movi v" #v ".4s, #0\n"
#define LGNET_NEON_CLEAR_8(a, b, c, d, e, f, g, h)                                                    \
  LGNET_NEON_CLEAR(a)                                                                                 \
  LGNET_NEON_CLEAR(b)                                                                                 \
  LGNET_NEON_CLEAR(c) LGNET_NEON_CLEAR(d) LGNET_NEON_CLEAR(e) LGNET_NEON_CLEAR(f) LGNET_NEON_CLEAR(g) \
      LGNET_NEON_CLEAR(h)
#define LGNET_NEON_CLEAR_ALL                       \
  LGNET_NEON_CLEAR_8(8, 9, 10, 11, 12, 13, 14, 15) \
  LGNET_NEON_CLEAR_8(16, 17, 18, 19, 20, 21, 22, 23) LGNET_NEON_CLEAR_8(24, 25, 26, 27, 28, 29, 30, 31)
#define LGNET_NEON_STORE(v0, v1) "stp q" #v0 ", q" #v1 ", [%[c]], #32\n"
#define LGNET_NEON_STORE_ALL                                                                              \
  LGNET_NEON_STORE(8, 9)                                                                                  \
  LGNET_NEON_STORE(10, 11)                                                                                \
  LGNET_NEON_STORE(12, 13) LGNET_NEON_STORE(14, 15) LGNET_NEON_STORE(16, 17) LGNET_NEON_STORE(18, 19)     \
      LGNET_NEON_STORE(20, 21) LGNET_NEON_STORE(22, 23) LGNET_NEON_STORE(24, 25) LGNET_NEON_STORE(26, 27) \
          LGNET_NEON_STORE(28, 29) LGNET_NEON_STORE(30, 31)

// Three vectors (b0, b1, b2) of four rows, whose elements are lanes (l0 .. l3) of registers (a0 .. a3).
#define LGNET_NEON_THREE(PRODUCT, acc0, acc1, acc2, b0, b1, b2, a, lane) \
  PRODUCT(acc0, b0, a, lane) PRODUCT(acc1, b1, a, lane) PRODUCT(acc2, b2, a, lane)
#define LGNET_NEON_LEFT(PRODUCT, b0, b1, b2, a0, l0, a1, l1, a2, l2, a3, l3) \
  LGNET_NEON_THREE(PRODUCT, 8, 9, 10, b0, b1, b2, a0, l0)                    \
  LGNET_NEON_THREE(PRODUCT, 14, 15, 16, b0, b1, b2, a1, l1)                  \
  LGNET_NEON_THREE(PRODUCT, 20, 21, 22, b0, b1, b2, a2, l2)                  \
  LGNET_NEON_THREE(PRODUCT, 26, 27, 28, b0, b1, b2, a3, l3)
#define LGNET_NEON_RIGHT(PRODUCT, b0, b1, b2, a0, l0, a1, l1, a2, l2, a3, l3) \
  LGNET_NEON_THREE(PRODUCT, 11, 12, 13, b0, b1, b2, a0, l0)                   \
  LGNET_NEON_THREE(PRODUCT, 17, 18, 19, b0, b1, b2, a1, l1)                   \
  LGNET_NEON_THREE(PRODUCT, 23, 24, 25, b0, b1, b2, a2, l2)                   \
  LGNET_NEON_THREE(PRODUCT, 29, 30, 31, b0, b1, b2, a3, l3)

// One step: the rows' elements side by side in one register.
#define LGNET_NEON_SCORE_STEP(PRODUCT, a)                                                              \
  "ldr q" #a                                                                                           \
  ", [%[a]], #32\n"                                                                                    \
  "ld1 {v2.4s, v3.4s, v4.4s}, [%[b]], #48\n"                                                           \
  "ld1 {v5.4s, v6.4s, v7.4s}, [%[b]], #48\n" LGNET_NEON_LEFT(PRODUCT, 2, 3, 4, a, 0, a, 1, a, 2, a, 3) \
      LGNET_NEON_RIGHT(PRODUCT, 5, 6, 7, a, 0, a, 1, a, 2, a, 3)

#define LGNET_NEON_SCORE_BLOCK(PRODUCT)        \
  int64_t fours = depth / 4, ones = depth % 4; \
  __asm__ volatile(LGNET_NEON_CLEAR_ALL                                                            \
                   "cbz %[fours], 2f\n"                                                            \
                   "1:\n" LGNET_NEON_SCORE_STEP(PRODUCT, 0) LGNET_NEON_SCORE_STEP(PRODUCT, 1)      \
                   LGNET_NEON_SCORE_STEP(PRODUCT, 0) LGNET_NEON_SCORE_STEP(PRODUCT, 1)             \
                   "subs %[fours], %[fours], #1\nb.ne 1b\n"                                        \
                   "2:\ncbz %[ones], 4f\n"                                                         \
                   "3:\n" LGNET_NEON_SCORE_STEP(PRODUCT, 0)                                        \
                   "subs %[ones], %[ones], #1\nb.ne 3b\n"                                          \
                   "4:\n" LGNET_NEON_STORE_ALL                                                     \
                   : [a] "+r"(a), [b] "+r"(b), [c] "+r"(c), [fours] "+r"(fours), [ones] "+r"(ones) \
                   :                                                                               \
                   : LGNET_NEON_CLOBBERS);

// Four steps: each row's four elements in a register, v0 to v3; b in v4 to v6, v7 is spare.
#define LGNET_NEON_VALUE_STEP(PRODUCT, lane)                                                                         \
  "ld1 {v4.4s, v5.4s, v6.4s}, [%[b]], #48\n" LGNET_NEON_LEFT(                                                        \
      PRODUCT, 4, 5, 6, 0, lane, 1, lane, 2, lane, 3,                                                                \
      lane) "ld1 {v4.4s, v5.4s, v6.4s}, [%[b]], #48\n" LGNET_NEON_RIGHT(PRODUCT, 4, 5, 6, 0, lane, 1, lane, 2, lane, \
                                                                        3, lane)
#define LGNET_NEON_VALUE_STEPS(PRODUCT, row0, row1, row2, row3)                            \
  "ldr q0, [%[a], " row0 "]\nldr q1, [%[a], " row1                                         \
  "]\n"                                                                                    \
  "ldr q2, [%[a], " row2 "]\nldr q3, [%[a], " row3 "]\n" LGNET_NEON_VALUE_STEP(PRODUCT, 0) \
      LGNET_NEON_VALUE_STEP(PRODUCT, 1) LGNET_NEON_VALUE_STEP(PRODUCT, 2) LGNET_NEON_VALUE_STEP(PRODUCT, 3)

// more: the steps of a group beyond its first four.
#define LGNET_NEON_VALUE_BLOCK(PRODUCT, row1, row2, row3, more)                                             \
  const int64_t stride = 4 * group_stride;                                                                  \
  __asm__ volatile(LGNET_NEON_CLEAR_ALL "1:\n" LGNET_NEON_VALUE_STEPS(PRODUCT, "#0", row1, row2, row3) more \
                   "add %[a], %[a], %[stride]\n"                                                            \
                   "subs %[groups], %[groups], #1\nb.ne 1b\n" LGNET_NEON_STORE_ALL                          \
                   : [a] "+r"(a), [b] "+r"(b), [c] "+r"(c), [groups] "+r"(groups)                           \
                   : [stride] "r"(stride)                                                                   \
                   : LGNET_NEON_CLOBBERS);
