// The work is cut into tasks of one read each, in the order of the target; threads take the next one. The
// checksum of a tensor is put together from those of its tasks.
#include "copy.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "crc32.h"

namespace adapt_pruner::io {
namespace {

// A gap up to this is read and thrown away, which costs less than another read.
constexpr int64_t kGapBytes = 32 << 10;
// Runs up to this are copied as if they were as long; what is too much is overwritten by the next one.
constexpr int64_t kShortRun = 32;
constexpr size_t kTasksAhead = 8;  // for which the kernel is asked to read already

// Part of a piece that is read at once: whole rows, or consecutive bytes of the runs of one row.
struct Task {
  const Piece* piece;
  size_t tensor;
  int64_t rows;         // 0: part of one row
  size_t first_run;     // of a part of a row
  int64_t skip;         // bytes of the first run that are not in this task
  int64_t read_offset;  // in the source
  int64_t read_bytes;
  int64_t target_offset;
  int64_t target_bytes;
};

class File {
 public:
  File(const std::string& path, int flags) : path_(path), descriptor_(::open(path.c_str(), flags | O_CLOEXEC)) {
    if (descriptor_ < 0) fail(errno);
  }
  File(File&& other) noexcept : path_(std::move(other.path_)), descriptor_(other.descriptor_) {
    other.descriptor_ = -1;
  }
  ~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }

  void read(char* data, int64_t length, int64_t offset) const {
    while (length > 0) {
      const ssize_t done = ::pread(descriptor_, data, size_t(length), offset);
      if (done < 0 && errno == EINTR) continue;
      if (done < 0) fail(errno);
      if (done == 0) fail(0);
      data += done, offset += done, length -= done;
    }
  }
  void write(const char* data, int64_t length, int64_t offset) const {
    while (length > 0) {
      const ssize_t done = ::pwrite(descriptor_, data, size_t(length), offset);
      if (done < 0 && errno == EINTR) continue;
      if (done < 0) fail(errno);
      data += done, offset += done, length -= done;
    }
  }
  // Has the kernel begin to bring bytes to the disk, which else would wait for the end.
  void begin_sync(int64_t offset, int64_t length) const {
    ::sync_file_range(descriptor_, offset, length, SYNC_FILE_RANGE_WRITE);  // a hint as well
  }
  void advise(int64_t offset, int64_t length, int advice) const {
    ::posix_fadvise(descriptor_, offset, length, advice);  // a hint: that it fails is no harm
  }

 private:
  [[noreturn]] void fail(int number) const { throw FileError{number, path_}; }

  std::string path_;
  int descriptor_;
};

class TaskList {
 public:
  explicit TaskList(int64_t buffer_bytes) : buffer_bytes_(buffer_bytes) {}

  void add(const Piece& piece, size_t tensor, int64_t& target_offset) {
    int64_t row_bytes = 0;
    for (size_t i = 0; i < piece.num_runs; ++i) row_bytes += piece.runs[i].length;
    if (row_bytes == 0) return;
    const bool wide = piece.stride > buffer_bytes_;
    if (piece.rows == 1 || wide) {
      for (int64_t row = 0; row < piece.rows; ++row) add_row(piece, tensor, row, target_offset);
      return;
    }
    const int64_t step = buffer_bytes_ / std::max<int64_t>(piece.stride, 1);
    const Run& last = piece.runs[piece.num_runs - 1];
    for (int64_t row = 0; row < piece.rows; row += step) {
      const int64_t rows = std::min(step, piece.rows - row);
      const int64_t first = piece.runs[0].first;
      const int64_t read = (rows - 1) * piece.stride + last.first + last.length - first;
      const int64_t offset = piece.offset + row * piece.stride + first;
      tasks.push_back({&piece, tensor, rows, 0, 0, offset, read, target_offset, rows * row_bytes});
      target_offset += rows * row_bytes;
    }
  }

  std::vector<Task> tasks;

 private:
  void add_row(const Piece& piece, size_t tensor, int64_t row, int64_t& target_offset) {
    const int64_t start = piece.offset + row * piece.stride;
    bool open = false;
    for (size_t i = 0; i < piece.num_runs; ++i) {
      const Run& run = piece.runs[i];
      for (int64_t done = 0; done < run.length;) {
        const int64_t begin = start + run.first + done;
        if (open) {
          const Task& task = tasks.back();
          const int64_t read_end = task.read_offset + task.read_bytes;
          open = begin - read_end <= kGapBytes && begin < task.read_offset + buffer_bytes_;
        }
        if (!open) tasks.push_back({&piece, tensor, 0, i, done, begin, 0, target_offset, 0});
        open = true;
        Task& task = tasks.back();
        const int64_t bytes = std::min(run.length - done, task.read_offset + buffer_bytes_ - begin);
        task.read_bytes = begin + bytes - task.read_offset;
        task.target_bytes += bytes;
        target_offset += bytes;
        done += bytes;
      }
    }
  }

  int64_t buffer_bytes_;
};

// What of the bytes that were read is kept; both buffers have kShortRun bytes to spare.
void gather(const Task& task, const char* read, char* target) {
  const Piece& piece = *task.piece;
  if (task.rows == 0) {
    const Run* run = piece.runs + task.first_run;
    const int64_t base = run->first + task.skip;
    int64_t skip = task.skip;
    for (int64_t left = task.target_bytes; left > 0; ++run, skip = 0) {
      const int64_t bytes = std::min(run->length - skip, left);
      std::memcpy(target, read + (run->first + skip - base), size_t(bytes));
      target += bytes, left -= bytes;
    }
    return;
  }
  const char* row = read - piece.runs[0].first;
  for (int64_t i = 0; i < task.rows; ++i, row += piece.stride) {
    for (const Run *run = piece.runs, *end = run + piece.num_runs; run != end; ++run) {
      if (run->length <= kShortRun) {
        std::memcpy(target, row + run->first, size_t(kShortRun));
      } else {
        std::memcpy(target, row + run->first, size_t(run->length));
      }
      target += run->length;
    }
  }
}

}  // namespace

std::vector<uint32_t> copy(const std::vector<std::string>& sources, const std::vector<Tensor>& tensors,
                           const std::string& target, int threads, int64_t buffer_bytes,
                           const std::atomic<bool>& stop) {
  std::vector<File> inputs;
  for (const std::string& path : sources) {
    inputs.emplace_back(path, O_RDONLY);
    inputs.back().advise(0, 0, POSIX_FADV_RANDOM);  // what comes next is asked for below, task by task
  }
  std::unique_ptr<File> output;
  if (!target.empty()) output = std::make_unique<File>(target, O_WRONLY);
  TaskList list(buffer_bytes);
  for (size_t i = 0; i < tensors.size(); ++i) {
    int64_t offset = tensors[i].target_offset;
    for (const Piece& piece : tensors[i].pieces) list.add(piece, i, offset);
  }
  const std::vector<Task>& tasks = list.tasks;
  std::vector<uint32_t> task_checksums(tasks.size());
  std::atomic<size_t> next = 0;
  std::atomic<bool> failed = false;
  std::mutex mutex;
  std::exception_ptr error;

  const auto read_ahead = [&](size_t i) {
    if (i < tasks.size()) {
      inputs[tasks[i].piece->source].advise(tasks[i].read_offset, tasks[i].read_bytes, POSIX_FADV_WILLNEED);
    }
  };
  const auto work = [&] {
    try {
      const std::unique_ptr<char[]> read(new char[size_t(buffer_bytes + kShortRun)]);
      const std::unique_ptr<char[]> kept(new char[size_t(buffer_bytes + kShortRun)]);
      for (size_t i; !stop && !failed && (i = next++) < tasks.size();) {
        const Task& task = tasks[i];
        read_ahead(i + kTasksAhead);
        inputs[task.piece->source].read(read.get(), task.read_bytes, task.read_offset);
        const bool whole = task.read_bytes == task.target_bytes;
        if (!whole) gather(task, read.get(), kept.get());
        const char* bytes = whole ? read.get() : kept.get();
        task_checksums[i] = crc32(bytes, size_t(task.target_bytes));
        if (output != nullptr) {
          output->write(bytes, task.target_bytes, task.target_offset);
          output->begin_sync(task.target_offset, task.target_bytes);
        }
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!failed) error = std::current_exception();
      failed = true;
    }
  };
  for (size_t i = 0; i < kTasksAhead; ++i) read_ahead(i);
  std::vector<std::thread> others;
  others.reserve(size_t(threads - 1));
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(work);
  } catch (const std::exception&) {  // no more threads are to be had: those that run do the work
  }
  work();
  for (std::thread& thread : others) thread.join();
  if (error) std::rethrow_exception(error);

  std::vector<uint32_t> checksums(tensors.size(), 0);
  for (size_t i = 0; i < tasks.size(); ++i) {
    uint32_t& checksum = checksums[tasks[i].tensor];
    checksum = combine(checksum, task_checksums[i], uint64_t(tasks[i].target_bytes));
  }
  return checksums;
}

}  // namespace adapt_pruner::io
