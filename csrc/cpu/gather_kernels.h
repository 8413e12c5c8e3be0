// Copies of what is kept of a member. Included by each_isa.h.

#include "line_writer.h"

// Items are kept rows.
inline void copy_rows(const Plan& plan, int64_t begin, int64_t end) {
  const GatherMember& member = plan.member;
  const int64_t row_bytes = member.cols * member.element_size;
  const bool dense = member.source_row_stride == member.cols;
  LineWriter writer(plan.target_row(begin), plan.stream);
  for (int64_t row = begin; row < end;) {
    const int64_t source = plan.source_row_of(row);
    int64_t count = 1;
    while (dense && row + count < end && plan.source_row_of(row + count) == source + count) ++count;
    writer.append(plan.source_row(source), count * row_bytes);
    row += count;
  }
  writer.finish();
}

// Items are rows.
inline void copy_column_runs(const Plan& plan, int64_t begin, int64_t end) {
  const int64_t size = plan.member.element_size;
  LineWriter writer(plan.target_row(begin), plan.stream);
  for (int64_t row = begin; row < end; ++row) {
    const char* source = plan.source_row(row);
    for (const Run& run : plan.runs) writer.append(source + run.source * size, run.length * size);
  }
  writer.finish();
}

// ---- compression: the kept ones of a block of eight elements, one mask per block ----

// Stores the kept elements in front of each other and returns their end. Whole registers are stored: up to a
// cache line behind the end is overwritten with anything.
template <class Word>
AP_INLINE Word* compress_block(const Word* source, uint8_t mask, Word* target) {
#if AP_ISA > 0
  if constexpr (sizeof(Word) == 2) {
    const __m128i control = _mm_load_si128(reinterpret_cast<const __m128i*>(kKept.bytes_of_words[mask]));
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm_shuffle_epi8(values, control));
  } else if constexpr (sizeof(Word) == 4) {
    const __m256i index = _mm256_load_si256(reinterpret_cast<const __m256i*>(kKept.index[mask]));
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm256_permutevar8x32_epi32(values, index));
  } else
#endif
  {
    for (int i = 0; i < 8; ++i) target[i] = source[kKept.index[mask][i]];
  }
  return target + __builtin_popcount(mask);
}

#if AP_ISA == 2
// The kept ones of a whole register of elements.
template <class Word>
AP_INLINE Word* compress_register(const Word* source, const uint8_t* masks, Word* target) {
  const __m512i values = _mm512_loadu_si512(source);
  if constexpr (sizeof(Word) == 1) {
    uint64_t mask;
    std::memcpy(&mask, masks, sizeof(mask));
    _mm512_storeu_si512(target, _mm512_maskz_compress_epi8(mask, values));
    return target + __builtin_popcountll(mask);
  } else if constexpr (sizeof(Word) == 2) {
    uint32_t mask;
    std::memcpy(&mask, masks, sizeof(mask));
    _mm512_storeu_si512(target, _mm512_maskz_compress_epi16(mask, values));
    return target + __builtin_popcount(mask);
  } else if constexpr (sizeof(Word) == 4) {
    uint16_t mask;
    std::memcpy(&mask, masks, sizeof(mask));
    _mm512_storeu_si512(target, _mm512_maskz_compress_epi32(mask, values));
    return target + __builtin_popcount(mask);
  } else {
    _mm512_storeu_si512(target, _mm512_maskz_compress_epi64(*masks, values));
    return target + __builtin_popcount(*masks);
  }
}
#endif

template <class Word>
AP_INLINE Word* compress(const Word* source, const uint8_t* masks, int64_t blocks, Word* target) {
  int64_t block = 0;
#if AP_ISA == 2
  constexpr int64_t kBlocks = kLineBytes / int64_t(8 * sizeof(Word));
  for (; block + kBlocks <= blocks; block += kBlocks) {
    prefetch(source + 8 * block, kAheadBytes);
    target = compress_register(source + 8 * block, masks + block, target);
  }
#endif
  for (; block < blocks; ++block) {
    prefetch(source + 8 * block, kAheadBytes);
    target = compress_block(source + 8 * block, masks[block], target);
  }
  return target;
}

// Items are rows. Reads no element behind a row's end.
template <class Word>
void compress_columns(const Plan& plan, int64_t begin, int64_t end) {
  constexpr int64_t kPieceBlocks = LineWriter::kCapacity / 2 / int64_t(8 * sizeof(Word));
  constexpr int64_t kPieceBytes = kPieceBlocks * 8 * int64_t(sizeof(Word));
  LineWriter writer(plan.target_row(begin), plan.stream);
  const auto append = [&](const Word* source, const uint8_t* masks, int64_t blocks) {
    if (writer.room() < kPieceBytes) writer.flush();
    Word* target = reinterpret_cast<Word*>(writer.position());
    const Word* target_end = compress(source, masks, blocks, target);
    writer.advance((target_end - target) * int64_t(sizeof(Word)));
  };
  const int64_t blocks = plan.member.cols / 8;
  const int64_t rest = plan.member.cols % 8;
  const uint8_t* masks = plan.column_masks.data();
  for (int64_t row = begin; row < end; ++row) {
    const Word* source = reinterpret_cast<const Word*>(plan.source_row(row));
    for (int64_t block = 0; block < blocks; block += kPieceBlocks) {
      append(source + block * 8, masks + block, std::min(kPieceBlocks, blocks - block));
    }
    if (rest > 0) {
      Word last[8] = {};
      std::memcpy(last, source + blocks * 8, size_t(rest) * sizeof(Word));
      append(last, masks + blocks, 1);
    }
  }
  writer.finish();
}
