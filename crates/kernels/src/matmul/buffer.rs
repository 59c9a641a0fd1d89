//! Aligned memory for packed weights.

use std::alloc;
use std::ptr::NonNull;

const LINE: usize = 64;
const HUGE: usize = 2 << 20;

/// `len` bytes, aligned to 64 B, or to 2 MiB with huge pages asked for when they are that many.
pub(crate) struct Buffer {
    data: NonNull<u8>,
    layout: alloc::Layout,
}

// SAFETY: the buffer owns its memory, like a Vec<u8>.
unsafe impl Send for Buffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Uninitialised: the caller writes all of it before it reads. `None` when the system has not that much memory.
    pub(crate) fn uninit(len: usize) -> Option<Buffer> {
        let align = if len >= HUGE { HUGE } else { LINE };
        let layout = alloc::Layout::from_size_align(len.max(1), align).ok()?;
        // SAFETY: the layout's size is at least 1.
        let data = NonNull::new(unsafe { alloc::alloc(layout) })?;
        #[cfg(target_os = "linux")]
        if len >= HUGE {
            // SAFETY: the range is ours; the advice changes no contents. A refusal only costs speed.
            unsafe { libc::madvise(data.as_ptr().cast(), len / HUGE * HUGE, libc::MADV_HUGEPAGE) };
        }
        Some(Buffer { data, layout })
    }

    pub(crate) fn ptr(&self) -> *const u8 {
        self.data.as_ptr()
    }

    pub(crate) fn ptr_mut(&mut self) -> *mut u8 {
        self.data.as_ptr()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `uninit` with this layout.
        unsafe { alloc::dealloc(self.data.as_ptr(), self.layout) };
    }
}

/// A pointer that tasks of a team may share. Whoever dereferences it shows that tasks touch disjoint parts.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(*mut T);

// SAFETY: only a pointer; see the type's contract.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: only a pointer; see the type's contract.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(p: *mut T) -> Shared<T> {
        Shared(p)
    }

    pub(crate) fn get(self) -> *mut T {
        self.0
    }

    /// Elements `at .. at + len`.
    ///
    /// # Safety
    /// They exist, and nothing else refers to them while the slice lives.
    pub(crate) unsafe fn slice<'a>(self, at: usize, len: usize) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), len) }
    }
}
