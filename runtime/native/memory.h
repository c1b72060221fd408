// Arrays aligned for vectors, zeroed, and never grown by less than they need.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace nuwa {

template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(std::size_t size) { make(size); }

  // At least `size` elements, of any content.
  void reserve(std::size_t size) {
    if (size > size_) make(size);
  }

  T* get() { return data_.get(); }
  const T* get() const { return data_.get(); }
  T& operator[](std::size_t i) { return data_.get()[i]; }
  const T& operator[](std::size_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* pointer) const { std::free(pointer); }
  };
  static constexpr std::size_t kLine = 64;  // bytes of a cache line and of the widest vector

  void make(std::size_t size) {
    const std::size_t bytes = (size * sizeof(T) + kLine - 1) / kLine * kLine;
    T* made = static_cast<T*>(std::aligned_alloc(kLine, bytes ? bytes : kLine));
    if (!made) throw std::bad_alloc();
    std::memset(made, 0, bytes);
    data_.reset(made);
    size_ = size;
  }

  std::unique_ptr<T, Free> data_;
  std::size_t size_ = 0;
};

}  // namespace nuwa
