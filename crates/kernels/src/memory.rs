//! Aligned memory for packed weights and for pages of keys and values: on huge pages, so that few address translations are needed.

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
        Self::alloc(len, false)
    }

    fn alloc(len: usize, zeroed: bool) -> Option<Buffer> {
        let align = if len >= HUGE { HUGE } else { LINE };
        let layout = alloc::Layout::from_size_align(len.max(1), align).ok()?;
        // SAFETY: the layout's size is at least 1.
        let data = NonNull::new(unsafe { alloc::alloc(layout) })?;
        #[cfg(target_os = "linux")]
        if len >= HUGE {
            // SAFETY: the range is ours; the advice changes no contents. A refusal only costs speed.
            unsafe { libc::madvise(data.as_ptr().cast(), len / HUGE * HUGE, libc::MADV_HUGEPAGE) };
        }
        if zeroed {
            // After the advice, so that the first touch is of huge pages.
            // SAFETY: `len` bytes are ours.
            unsafe { data.as_ptr().write_bytes(0, len) };
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

mod sealed {
    /// Numbers for which all bits zero is 0.
    pub trait Number: Copy {}
    impl Number for u16 {}
    impl Number for f32 {}
}

/// A fixed number of `u16` or `f32`, at first zeros.
pub struct Slab<T: sealed::Number> {
    buffer: Buffer,
    len: usize,
    kind: std::marker::PhantomData<T>,
}

impl<T: sealed::Number> Slab<T> {
    /// `len` zeros. `None` when the system has not that much memory.
    pub fn zeroed(len: usize) -> Option<Self> {
        let buffer = Buffer::alloc(len.checked_mul(size_of::<T>())?, true)?;
        Some(Self {
            buffer,
            len,
            kind: std::marker::PhantomData,
        })
    }
}

impl<T: sealed::Number> std::ops::Deref for Slab<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` numbers, initialised in `zeroed`, aligned to at least 64 bytes.
        unsafe { std::slice::from_raw_parts(self.buffer.ptr().cast(), self.len) }
    }
}

impl<T: sealed::Number> std::ops::DerefMut for Slab<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and the slab is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.buffer.ptr_mut().cast(), self.len) }
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
}

/// Asks the allocator to keep big blocks instead of giving them back to the system: a trainer asks for the same sizes at every step, and fresh
/// pages cost more than the arithmetic on them. Does nothing where the C library has no such setting.
pub fn keep_big_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: sets two numbers of the allocator; any thread may do so at any time.
        unsafe {
            libc::mallopt(libc::M_MMAP_MAX, 0);
            libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        }
    }
}
