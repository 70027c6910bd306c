// Scratch memory, reused by the thread that had it.
#include <cstdlib>
#include <new>
#include <vector>

#include "path_plan.h"

namespace paikern {
namespace {

constexpr size_t kKeptBytes = size_t{32} << 20, kKeptBlocks = 16;  // a thread

class Pool {
 public:
  ~Pool() {
    for (const Block &block : blocks_) std::free(block.data);
  }

  void *take(size_t bytes, size_t &capacity) {
    size_t best = blocks_.size();
    for (size_t i = 0; i < blocks_.size(); ++i) {
      if (blocks_[i].bytes >= bytes && (best == blocks_.size() || blocks_[i].bytes < blocks_[best].bytes)) best = i;
    }
    if (best < blocks_.size()) {
      const Block found = blocks_[best];
      blocks_[best] = blocks_.back();
      blocks_.pop_back();
      held_ -= found.bytes;
      capacity = found.bytes;
      return found.data;
    }
    capacity = (bytes + 4095) / 4096 * 4096;
    void *data = std::aligned_alloc(64, capacity);
    if (!data) throw std::bad_alloc();
    return data;
  }

  void give(void *data, size_t bytes) {
    if (held_ + bytes > kKeptBytes) {
      std::free(data);
      return;
    }
    if (blocks_.size() == kKeptBlocks) {
      held_ -= blocks_.front().bytes;
      std::free(blocks_.front().data);
      blocks_.front() = blocks_.back();
      blocks_.pop_back();
    }
    blocks_.push_back({data, bytes});
    held_ += bytes;
  }

 private:
  struct Block {
    void *data;
    size_t bytes;
  };
  std::vector<Block> blocks_;
  size_t held_ = 0;
};

Pool &pool() {
  thread_local Pool instance;
  return instance;
}

}  // namespace

void *take_scratch(size_t bytes, size_t &capacity) { return pool().take(bytes, capacity); }

void give_scratch(void *block, size_t capacity) { pool().give(block, capacity); }

}  // namespace paikern
