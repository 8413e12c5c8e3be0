// Copies parts of files into a file, in parallel and in bounded memory. No Python, no torch.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace adapt_pruner::io {

struct Run {  // bytes of a row
  int64_t first;
  int64_t length;
};

// Of each row, from `offset` on in the source, the runs: they come one after the other in the target.
struct Piece {
  size_t source;
  int64_t offset;
  int64_t rows;
  int64_t stride;  // bytes from one row to the next
  const Run* runs;
  size_t num_runs;
};

struct Tensor {
  int64_t target_offset;
  std::vector<Piece> pieces;
};

struct FileError {
  int number;  // errno, or 0 for a file that ends too early
  std::string path;
};

// Writes the tensors to the target, or nothing where that is empty, and returns the CRC-32 of each.
//
// Every thread has two buffers of `buffer_bytes` and a few bytes; there are fewer threads where the system has
// no more. Throws FileError and std::bad_alloc. Returns early, with any checksums, once `stop` is set.
std::vector<uint32_t> copy(const std::vector<std::string>& sources, const std::vector<Tensor>& tensors,
                           const std::string& target, int threads, int64_t buffer_bytes,
                           const std::atomic<bool>& stop);

}  // namespace adapt_pruner::io
