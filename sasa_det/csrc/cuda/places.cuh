// What depends on nothing but the number of a thread: places of its matrices in shared memory. Each
// takes a dozen instructions, and in a loop the compiler finds it again each time, as it has few
// registers to keep it in. They are in a table instead.
#pragma once

#include <tile.cuh>

// Those of all threads, as ForProducts and ForSums have them.
template <int DEPTH, int PARTS>
struct Places {
  using H = Heads<DEPTH>;
  static constexpr int THREADS = 32 * WARPS_OF<PARTS>;
  alignas(16) u32 for_products[THREADS][4], for_sums[THREADS][4];

  DEVICE constexpr Places() : for_products{}, for_sums{} {
    for (int number = 0; number < THREADS; ++number) {
      const Thread me(number, PARTS);
      const int pixel = me.lane % 8, matrix = me.lane / 8;
      for_products[number][0] = (me.row() + matrix % 2) * H::OWN_ROW_BYTES +
                                H::at(me.col() + pixel, DEPTH == 8 ? 0 : matrix / 2);
      // The head's chunk, near and far, of two rows; two chunks, near and far; or four chunks.
      const int row = me.row() + (DEPTH == 8 ? matrix / 2 : 0);
      const int further = DEPTH == 8 ? matrix % 2 : DEPTH == 16 ? matrix / 2 : 0;
      const int chunk = DEPTH == 8 ? 0 : DEPTH == 16 ? matrix % 2 : matrix;
      for_products[number][1] = row * H::ROW_BYTES + H::at(me.col() + 8 * further + pixel, chunk);
      for_products[number][2] = me.row() * H::ROW_BYTES + H::at(me.col() + me.g, me.t);
      for_sums[number][0] = me.row() * H::OWN_ROW_BYTES + H::at(me.col() + me.g, 0) + 4 * me.t;
      // Two rows, near and far of columns 0 to 3 and of columns 4 to 7.
      const int col = me.col() + matrix % 2 * 4 + pixel / 2 + pixel % 2 * 8;
      for_sums[number][1] = (me.row() + matrix / 2) * H::ROW_BYTES + H::at(col, 0);
      for_sums[number][2] = (0x8888u | (0x5555u & ((1u << 2 * me.g) - 1))) * 0x10001u;
    }
  }
};
template <int DEPTH, int PARTS>
TABLE Places<DEPTH, PARTS> PLACES{};

// Of a thread, what products of queries begin with, for the first part of its warp.
template <int DEPTH, int PARTS>
struct ForProducts {
  u32 operands;  // of its own pixels, in OwnPixels
  u32 columns;   // in PixelsAsColumns, of matrices
  u32 chunks;    // and of chunks

  DEVICE ForProducts() {
    u32 words[4];
    load_of_table(words, PLACES<DEPTH, PARTS>.for_products[threadIdx.x]);
    operands = words[0], columns = words[1], chunks = words[2];
  }
};

// And what sums of values take, which is loaded when it is wanted.
template <int DEPTH, int PARTS>
struct ForSums {
  u32 words;  // of its own pixels, in OwnPixels
  u32 rows;   // in PixelsAsRows
  // Of sparse products of weights, of rows of near and far in turn: of each four columns, 0 or 1
  // and 2 or 3, one bit for each of the pairs that are far.
  u32 far_of_four;

  DEVICE ForSums() {
    u32 all[4];
    // For each head, so that they take no registers for the next.
    const u32 number = Heads<DEPTH>::COUNT > 1 ? thread_again() : threadIdx.x;
    load_of_table(all, PLACES<DEPTH, PARTS>.for_sums[number]);
    words = all[0], rows = all[1], far_of_four = all[2];
  }
};
