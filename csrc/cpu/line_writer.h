// Writes bytes one after the other through a small buffer, whole cache lines at a time. Included once per
// instruction set, inside its namespace.

// Writes exactly the bytes it was given, from `target` on: nothing in front, nothing behind. Parts of a line
// at both ends are written byte by byte, as they may belong to another thread.
//
// `stream` writes around the caches, which pays where the output is much larger than they are.
class LineWriter {
 public:
  static constexpr int64_t kCapacity = 8192;

  LineWriter(char* target, bool stream) : stream_(stream) {
    filled_ = int64_t(reinterpret_cast<uintptr_t>(target) % uintptr_t(kLineBytes));
    skipped_ = filled_;
    line_ = target - filled_;
  }

  // Where the next bytes go. The `room()` bytes from there, and a line behind them, may be overwritten;
  // `advance` says how many of them count.
  char* position() { return buffer_ + filled_; }
  int64_t room() const { return kCapacity - filled_; }
  void advance(int64_t bytes) { filled_ += bytes; }

  void append(const char* source, int64_t bytes) {
    while (bytes > 0) {
      int64_t part;
      if (filled_ == 0 && bytes >= kLineBytes) {  // past the buffer
        part = bytes / kLineBytes * kLineBytes;
        write_lines(source, part);
      } else {
        // long pieces only complete the line, so that the rest goes past the buffer
        const int64_t wanted = bytes >= kCapacity ? (kCapacity - filled_) % kLineBytes : room();
        part = std::min(bytes, wanted);
        std::memcpy(position(), source, size_t(part));
        filled_ += part;
        if (room() == 0 || bytes >= kCapacity) flush();
      }
      source += part;
      bytes -= part;
    }
  }

  // Writes the full lines of the buffer.
  void flush() {
    const int64_t full = filled_ / kLineBytes * kLineBytes;
    if (full == 0) return;
    int64_t begin = 0;
    if (skipped_ > 0) {
      std::memcpy(line_ + skipped_, buffer_ + skipped_, size_t(kLineBytes - skipped_));
      line_ += kLineBytes;
      begin = kLineBytes;
      skipped_ = 0;
    }
    write_lines(buffer_ + begin, full - begin);
    filled_ -= full;
    std::memcpy(buffer_, buffer_ + full, size_t(filled_));
  }

  void finish() {
    flush();
    std::memcpy(line_ + skipped_, buffer_ + skipped_, size_t(filled_ - skipped_));
    if (stream_) stream_fence();
  }

 private:
  void write_lines(const char* source, int64_t bytes) {
    if (stream_) {
      stream_lines(line_, source, bytes);
    } else {
      std::memcpy(line_, source, size_t(bytes));
    }
    line_ += bytes;
  }

  char* line_;       // of the target: where buffer_[0] goes
  int64_t filled_;   // bytes of the buffer, the skipped ones included
  int64_t skipped_;  // bytes of the first line that lie in front of the target
  bool stream_;
  alignas(kLineBytes) char buffer_[kCapacity + kLineBytes];
};
