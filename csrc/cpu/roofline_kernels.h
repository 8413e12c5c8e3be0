// Reads and copies at the rate of the memory. Included by each_isa.h.

// Both streams, a line of each in turn; `ahead` asks for their memory early, as the other kernels do. The
// result depends on every byte, so no load can be left out.
template <bool ahead>
uint64_t read_lines(const char* a, const char* b, int64_t bytes) {
  typedef uint64_t Words __attribute__((vector_size(32)));
  Words sums[4] = {};
  for (int64_t i = 0; i < bytes; i += kLineBytes) {
    if (ahead) {
      prefetch(a + i, kAheadBytes);
      prefetch(b + i, kAheadBytes);
    }
    sums[0] ^= load_as<Words>(a + i);
    sums[1] ^= load_as<Words>(a + i + kLineBytes / 2);
    sums[2] ^= load_as<Words>(b + i);
    sums[3] ^= load_as<Words>(b + i + kLineBytes / 2);
  }
  const Words sum = (sums[0] ^ sums[1]) ^ (sums[2] ^ sums[3]);
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

inline void copy_streaming(char* target, const char* source, int64_t bytes) {
  stream_lines(target, source, bytes);
  stream_fence();
}
