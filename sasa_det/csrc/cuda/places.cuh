// What depends on nothing but the number of a thread: places of its matrices in shared memory. Each
// takes a dozen instructions, and in a loop the compiler finds it again each time, as it has few
// registers to keep it in. They are in a table instead.
#pragma once

#include <tile.cuh>

template <int DEPTH>
struct alignas(16) Places {
  using H = Heads<DEPTH>;
  static constexpr int OWN_ROW_BYTES = TILE_COLS * H::PIXEL_BYTES;
  enum Name { OPERANDS, COLUMNS, WORDS = 4, ROWS, FAR_OF_FOUR };
  enum First { FOR_PRODUCTS = 0, FOR_SUMS = 4 };
  static constexpr int COUNT = 8;
  u32 numbers[THREADS][COUNT];

  DEVICE constexpr Places() : numbers{} {
    for (int number = 0; number < THREADS; ++number) {
      const Thread me(number);
      const int pixel = me.lane % 8, matrix = me.lane / 8;
      u32(&of)[COUNT] = numbers[number];
      // Of its own pixels, in OwnPixels.
      of[OPERANDS] = (me.row() + matrix % 2) * OWN_ROW_BYTES +
                     H::at(me.col() + pixel, DEPTH == 8 ? 0 : matrix / 2);
      of[WORDS] = me.row() * OWN_ROW_BYTES + H::at(me.col() + me.g, 0) + 4 * me.t;
      // In PixelsAsColumns: the head's chunk, near and far, of two rows; two chunks, near and far;
      // or four chunks.
      const int row = me.row() + (DEPTH == 8 ? matrix / 2 : 0);
      const int further = DEPTH == 8 ? matrix % 2 : DEPTH == 16 ? matrix / 2 : 0;
      const int chunk = DEPTH == 8 ? 0 : DEPTH == 16 ? matrix % 2 : matrix;
      of[COLUMNS] = row * H::ROW_BYTES + H::at(me.col() + 8 * further + pixel, chunk);
      // In PixelsAsRows: two rows, near and far of columns 0 to 3 and of columns 4 to 7.
      const int col = me.col() + matrix % 2 * 4 + pixel / 2 + pixel % 2 * 8;
      of[ROWS] = (me.row() + matrix / 2) * H::ROW_BYTES + H::at(col, 0);
      // Of sparse products of weights, of rows of near and far in turn: of each four columns, 0 or
      // 1 and 2 or 3, one bit for each of the pairs that are far.
      of[FAR_OF_FOUR] = (0x8888u | (0x5555u & ((1u << 2 * me.g) - 1))) * 0x10001u;
    }
  }
};
template <int DEPTH>
TABLE Places<DEPTH> PLACES{};

// Those of a thread, which it loads when they are wanted: four that products begin with, and four
// for sums of values.
template <int DEPTH>
class OwnPlaces {
  u32 numbers_[4];
  int first_;

 public:
  DEVICE explicit OwnPlaces(typename Places<DEPTH>::First first) : first_(first) {
    load_of_table(numbers_, PLACES<DEPTH>.numbers[threadIdx.x] + first);
  }
  DEVICE u32 operator[](typename Places<DEPTH>::Name name) const { return numbers_[name - first_]; }
};
