//! The arena of pages, its accountant, and the page tables of sequences.

use antefix_kernels::attend::{KvDtype, Page, PageLayout, PageMut};
use antefix_kernels::memory::Slab;
use antefix_state::PAGE_ROWS;

/// What one token's keys and values look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KvShape {
    /// Decoder layers.
    pub layers: usize,
    /// KV heads a layer.
    pub kv_heads: usize,
    /// Head dimension `D`.
    pub dim: usize,
    /// Type of a stored value.
    pub dtype: KvDtype,
}

impl KvShape {
    /// (layer, head) pairs: every 32 tokens take as many pages.
    pub fn runs(&self) -> usize {
        self.layers * self.kv_heads
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.layout().bytes()
    }

    /// Bytes of a block: the pages of 32 tokens.
    pub fn block_bytes(&self) -> usize {
        self.runs() * self.page_bytes()
    }

    /// The layout of a page.
    pub fn layout(&self) -> PageLayout {
        PageLayout {
            dim: self.dim,
            dtype: self.dtype,
        }
    }
}

/// A page of a pool. Two sequences share keys exactly when their tables name the same page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId(u32);

/// Why the cache cannot serve.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KvError {
    /// The accountant refuses; nothing was allocated.
    #[error(
        "the KV cache needs {asked} more bytes, {free} of {capacity} are free\nhint: lower the context or the number of requests, or raise the KV capacity"
    )]
    OutOfMemory {
        /// Bytes asked for.
        asked: usize,
        /// Bytes not in use.
        free: usize,
        /// Bytes of the pool.
        capacity: usize,
    },
    /// Bytes that are no block of this pool's shape.
    #[error("a block of this model has {want} bytes, not {got}")]
    BlockBytes {
        /// Bytes given.
        got: usize,
        /// Bytes of a block.
        want: usize,
    },
}

/// Figures of a pool, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// Pages that exist at most.
    pub capacity: usize,
    /// Pages taken from the system so far.
    pub bytes_allocated: usize,
    /// Pages that somebody holds, and what is set aside.
    pub bytes_used: usize,
    /// Of those, set aside by [`Pool::set_aside`].
    pub bytes_aside: usize,
}

/// A sequence's pages.
///
/// It must be given back with [`Pool::release`]; dropping it leaves its pages counted as used.
#[derive(Debug)]
#[must_use = "pages are only freed by Pool::release"]
pub struct SeqKv {
    kv_heads: usize,
    /// `[layer * kv_heads + head]`.
    tables: Vec<Vec<PageId>>,
    len: usize,
}

impl SeqKv {
    /// An empty sequence.
    pub fn new(shape: KvShape) -> Self {
        Self {
            kv_heads: shape.kv_heads,
            tables: vec![Vec::new(); shape.runs()],
            len: 0,
        }
    }

    /// Tokens whose keys and values are written.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is written.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Pages of one (layer, head), the reserved ones included, in ascending position.
    pub fn pages(&self, layer: usize, head: usize) -> &[PageId] {
        &self.tables[layer * self.kv_heads + head]
    }

    /// Tokens that fit into its pages.
    pub fn room(&self) -> usize {
        self.tables.first().map_or(0, Vec::len) * PAGE_ROWS
    }

    /// `n` more tokens are written in every layer.
    ///
    /// # Panics
    /// When they were not reserved.
    pub fn commit(&mut self, n: usize) {
        assert!(
            self.len + n <= self.room(),
            "tokens are reserved before they are written"
        );
        self.len += n;
    }

    /// Page `block` of every (layer, head).
    pub(crate) fn block(&self, block: usize) -> Vec<PageId> {
        self.tables.iter().map(|t| t[block]).collect()
    }

    /// Appends a full block that another owner shares; the caller has counted the references.
    pub(crate) fn push_block(&mut self, pages: &[PageId]) {
        for (table, &page) in self.tables.iter_mut().zip(pages) {
            table.push(page);
        }
        self.len += PAGE_ROWS;
    }
}

enum Chunk {
    Bf16(Slab<u16>),
    F32(Slab<f32>),
}

/// Bytes taken from the system at a time.
const CHUNK_BYTES: usize = 4 << 20;

/// The arena of pages of one shape.
pub struct Pool {
    shape: KvShape,
    chunks: Vec<Chunk>,
    pages_per_chunk: usize,
    /// Owners of each page; 0 = free.
    owners: Vec<u32>,
    free: Vec<PageId>,
    capacity_pages: usize,
    /// Bytes that are counted though they lie elsewhere.
    aside: usize,
}

impl Pool {
    /// A pool that never holds more than `capacity` bytes of pages. Nothing is allocated yet.
    pub fn new(shape: KvShape, capacity: usize) -> Self {
        Self {
            shape,
            chunks: Vec::new(),
            pages_per_chunk: (CHUNK_BYTES / shape.page_bytes()).max(1),
            owners: Vec::new(),
            free: Vec::new(),
            capacity_pages: (capacity / shape.page_bytes()).min(u32::MAX as usize),
            aside: 0,
        }
    }

    /// The shape of its tokens.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Bytes of pages at most.
    pub fn capacity(&self) -> usize {
        self.capacity_pages * self.shape.page_bytes()
    }

    /// Bytes of pages that `tokens` tokens of one sequence take.
    pub fn bytes_for(&self, tokens: usize) -> usize {
        tokens
            .div_ceil(PAGE_ROWS)
            .saturating_mul(self.shape.block_bytes())
    }

    fn used_pages(&self) -> usize {
        self.owners.len() - self.free.len()
    }

    /// Pages that may still be taken.
    fn free_pages(&self) -> usize {
        let aside = self.aside.div_ceil(self.shape.page_bytes());
        self.capacity_pages - self.used_pages() - aside
    }

    /// Bytes of pages that nobody holds.
    pub fn free_bytes(&self) -> usize {
        self.free_pages() * self.shape.page_bytes()
    }

    /// Counts `bytes` bytes as used for memory that lies outside the pages, such as what a sequence's planner keeps of its keys, instead of the
    /// `aside` bytes that its owner had set aside before.
    ///
    /// # Errors
    /// When the capacity does not allow it; then nothing has changed. Less than before is always allowed.
    pub fn set_aside(&mut self, aside: &mut usize, bytes: usize) -> Result<(), KvError> {
        let page = self.shape.page_bytes();
        let more = bytes.saturating_sub(*aside);
        let others = self.aside - *aside;
        let room = (self.capacity_pages - self.used_pages()) * page;
        if more > 0 && others.saturating_add(bytes) > room {
            return Err(KvError::OutOfMemory {
                asked: more,
                free: self.free_bytes(),
                capacity: self.capacity(),
            });
        }
        (self.aside, *aside) = (others + bytes, bytes);
        Ok(())
    }

    /// Figures for reports.
    pub fn stats(&self) -> Stats {
        let page = self.shape.page_bytes();
        Stats {
            capacity: self.capacity(),
            bytes_allocated: self.chunks.len() * self.pages_per_chunk * page,
            bytes_used: self.used_pages() * page + self.aside,
            bytes_aside: self.aside,
        }
    }

    /// Makes room for `n` tokens after the written ones, copying a shared last page.
    ///
    /// # Errors
    /// When the capacity does not allow it; then nothing has changed.
    pub fn reserve(&mut self, seq: &mut SeqKv, n: usize) -> Result<(), KvError> {
        let have = seq.room() / PAGE_ROWS;
        let want = (seq.len + n).div_ceil(PAGE_ROWS);
        let new = want.saturating_sub(have);
        let partial = (!seq.len.is_multiple_of(PAGE_ROWS)).then_some(seq.len / PAGE_ROWS);
        let copies = |owners: &[u32]| {
            let shared = |p: usize| seq.tables.iter().filter(|t| owners[t[p].0 as usize] > 1).count();
            partial.map_or(0, shared)
        };
        self.admit(new * self.shape.runs() + copies(&self.owners))?;
        if let Some(at) = partial {
            for table in &mut seq.tables {
                if self.owners[table[at].0 as usize] > 1 {
                    let copy = self.take();
                    self.copy(table[at], copy);
                    self.drop_ref(table[at]);
                    table[at] = copy;
                }
            }
        }
        for table in &mut seq.tables {
            for _ in 0..new {
                table.push(self.take());
            }
        }
        Ok(())
    }

    /// Writes keys and values `[n, Hk, D]` of one layer at positions `pos..`.
    ///
    /// # Panics
    /// When the positions are not reserved or a page is shared: always a mistake of the caller.
    pub fn write(&mut self, seq: &SeqKv, layer: usize, pos: usize, k: &[f32], v: &[f32]) {
        let KvShape { kv_heads, dim, .. } = self.shape;
        let width = kv_heads * dim;
        assert!(
            k.len() == v.len() && k.len().is_multiple_of(width),
            "keys and values are [n, Hk, D]"
        );
        for (i, (k, v)) in k.chunks_exact(width).zip(v.chunks_exact(width)).enumerate() {
            let (block, row) = ((pos + i) / PAGE_ROWS, (pos + i) % PAGE_ROWS);
            for head in 0..kv_heads {
                let page = seq.pages(layer, head)[block];
                assert_eq!(self.owners[page.0 as usize], 1, "shared pages are never written");
                let span = head * dim..(head + 1) * dim;
                self.page_mut(page).write_row(row, &k[span.clone()], &v[span]);
            }
        }
    }

    /// Keeps the first `len` tokens and frees the pages behind them, reserved ones included.
    pub fn truncate(&mut self, seq: &mut SeqKv, len: usize) {
        let keep = len.min(seq.len).div_ceil(PAGE_ROWS);
        for table in &mut seq.tables {
            for page in table.drain(keep.min(table.len())..) {
                self.drop_ref(page);
            }
        }
        seq.len = seq.len.min(len);
    }

    /// A second sequence with the same tokens: full pages are shared, a partial one is copied.
    ///
    /// # Errors
    /// When there is no room for the copy.
    pub fn fork(&mut self, seq: &SeqKv) -> Result<SeqKv, KvError> {
        let full = seq.len / PAGE_ROWS;
        let mut twin = SeqKv {
            kv_heads: seq.kv_heads,
            tables: Vec::new(),
            len: seq.len,
        };
        let held = seq.len.div_ceil(PAGE_ROWS);
        twin.tables = seq.tables.iter().map(|t| t[..held].to_vec()).collect();
        for page in twin.tables.iter().flatten() {
            self.owners[page.0 as usize] += 1;
        }
        if full < held
            && let Err(error) = self.reserve(&mut twin, 0)
        {
            self.release(twin);
            return Err(error);
        }
        Ok(twin)
    }

    /// Gives a sequence's pages back.
    pub fn release(&mut self, seq: SeqKv) {
        for page in seq.tables.into_iter().flatten() {
            self.drop_ref(page);
        }
    }

    /// A page to be read.
    pub fn page(&self, id: PageId) -> Page<'_> {
        let part = self.shape.layout().part_len();
        let (chunk, at) = self.place(id);
        match &self.chunks[chunk] {
            Chunk::Bf16(data) => Page::Bf16 {
                k: &data[at..at + part],
                v: &data[at + part..at + 2 * part],
            },
            Chunk::F32(data) => Page::F32 {
                k: &data[at..at + part],
                v: &data[at + part..at + 2 * part],
            },
        }
    }

    /// Writes the pages of a full block of `seq` into `out`, exactly as they are stored.
    ///
    /// `[layer * Hk + head]` pages, each its keys and then its values in the order of [`PageLayout`], little-endian.
    ///
    /// # Panics
    /// When not all 32 tokens of the block are written.
    pub fn export_block(&self, seq: &SeqKv, block: usize, out: &mut Vec<u8>) {
        assert!(
            (block + 1) * PAGE_ROWS <= seq.len,
            "only full blocks leave the pool"
        );
        self.export_pages(&seq.block(block), out);
    }

    /// The same for the pages of a block, `[layer * Hk + head]`, whoever holds them.
    pub fn export_pages(&self, pages: &[PageId], out: &mut Vec<u8>) {
        out.clear();
        out.reserve(self.shape.block_bytes());
        for &page in pages {
            self.export_page(page, out);
        }
    }

    /// Appends a page to `out` as it is stored, its keys and then its values.
    pub(crate) fn export_page(&self, id: PageId, out: &mut Vec<u8>) {
        match self.page(id) {
            Page::Bf16 { k, v } => [k, v].iter().for_each(|part| put_bytes(part, out)),
            Page::F32 { k, v } => [k, v].iter().for_each(|part| put_bytes(part, out)),
        }
    }

    /// Fills a page with the bytes that [`Pool::export_page`] has written.
    pub(crate) fn import_page(&mut self, id: PageId, bytes: &[u8]) {
        let (keys, values) = bytes.split_at(bytes.len() / 2);
        match self.page_mut(id) {
            PageMut::Bf16 { k, v } => {
                get_bytes(keys, k);
                get_bytes(values, v);
            }
            PageMut::F32 { k, v } => {
                get_bytes(keys, k);
                get_bytes(values, v);
            }
        }
    }

    /// Appends a block that [`Pool::export_block`] has written to `seq`, bit for bit the same.
    ///
    /// # Errors
    /// When there is no room or `bytes` has another length; then nothing has changed.
    ///
    /// # Panics
    /// When the last page of `seq` is not full, or more are reserved.
    pub fn import_block(&mut self, seq: &mut SeqKv, bytes: &[u8]) -> Result<(), KvError> {
        let want = self.shape.block_bytes();
        if bytes.len() != want {
            let got = bytes.len();
            return Err(KvError::BlockBytes { got, want });
        }
        assert_eq!(seq.len, seq.room(), "blocks are appended to full blocks");
        self.reserve(seq, PAGE_ROWS)?;
        let page_bytes = self.shape.page_bytes();
        for (table, bytes) in seq.tables.iter().zip(bytes.chunks_exact(page_bytes)) {
            if let Some(&page) = table.last() {
                self.import_page(page, bytes);
            }
        }
        seq.commit(PAGE_ROWS);
        Ok(())
    }

    /// Owners of a page: sequences and the radix tree.
    pub fn owners(&self, id: PageId) -> u32 {
        self.owners[id.0 as usize]
    }

    pub(crate) fn page_mut(&mut self, id: PageId) -> PageMut<'_> {
        let part = self.shape.layout().part_len();
        let (chunk, at) = self.place(id);
        match &mut self.chunks[chunk] {
            Chunk::Bf16(data) => {
                let (k, v) = data[at..at + 2 * part].split_at_mut(part);
                PageMut::Bf16 { k, v }
            }
            Chunk::F32(data) => {
                let (k, v) = data[at..at + 2 * part].split_at_mut(part);
                PageMut::F32 { k, v }
            }
        }
    }

    fn place(&self, id: PageId) -> (usize, usize) {
        let (chunk, slot) = (
            id.0 as usize / self.pages_per_chunk,
            id.0 as usize % self.pages_per_chunk,
        );
        (chunk, slot * 2 * self.shape.layout().part_len())
    }

    fn copy(&mut self, from: PageId, to: PageId) {
        let part = self.shape.layout().part_len();
        let ((fc, fa), (tc, ta)) = (self.place(from), self.place(to));
        let span = fa..fa + 2 * part;
        if fc == tc {
            match &mut self.chunks[fc] {
                Chunk::Bf16(data) => data.copy_within(span, ta),
                Chunk::F32(data) => data.copy_within(span, ta),
            }
            return;
        }
        let to = ta..ta + 2 * part;
        match self.chunks.get_disjoint_mut([fc, tc]) {
            Ok([Chunk::Bf16(a), Chunk::Bf16(b)]) => b[to].copy_from_slice(&a[span]),
            Ok([Chunk::F32(a), Chunk::F32(b)]) => b[to].copy_from_slice(&a[span]),
            _ => unreachable!("a pool has one type, and the chunks differ"),
        }
    }

    pub(crate) fn add_ref(&mut self, id: PageId) {
        self.owners[id.0 as usize] += 1;
    }

    pub(crate) fn drop_ref(&mut self, id: PageId) {
        let owners = &mut self.owners[id.0 as usize];
        *owners -= 1;
        if *owners == 0 {
            self.free.push(id);
        }
    }

    /// A page with one owner. The caller has asked the accountant.
    pub(crate) fn take(&mut self) -> PageId {
        let id = self.free.pop().expect("`admit` has made sure of the pages");
        self.owners[id.0 as usize] = 1;
        id
    }

    /// Makes sure that `pages` pages can be taken.
    pub(crate) fn admit(&mut self, pages: usize) -> Result<(), KvError> {
        if pages <= self.free_pages() && self.has_free(pages) {
            return Ok(());
        }
        Err(KvError::OutOfMemory {
            asked: pages.saturating_mul(self.shape.page_bytes()),
            free: self.free_bytes(),
            capacity: self.capacity(),
        })
    }

    /// Whether `pages` pages are free now, after growing if need be.
    fn has_free(&mut self, pages: usize) -> bool {
        while self.free.len() < pages {
            if self.grow().is_none() {
                return false;
            }
        }
        true
    }

    /// Nothing when the system has no more memory, whatever the capacity says.
    fn grow(&mut self) -> Option<()> {
        // The last chunk may hold fewer pages than its memory: the capacity is kept to the page.
        let pages = self.pages_per_chunk.min(self.capacity_pages - self.owners.len());
        if pages == 0 {
            return None;
        }
        let len = pages * 2 * self.shape.layout().part_len();
        self.chunks.push(match self.shape.dtype {
            KvDtype::Bf16 => Chunk::Bf16(Slab::zeroed(len)?),
            KvDtype::F32 => Chunk::F32(Slab::zeroed(len)?),
        });
        let first = self.owners.len() as u32;
        self.owners.resize(self.owners.len() + pages, 0);
        self.free.extend((first..first + pages as u32).rev().map(PageId));
        Some(())
    }
}

/// A stored value as bytes.
trait Stored<const N: usize>: Copy {
    fn bytes(self) -> [u8; N];
    fn of(bytes: [u8; N]) -> Self;
}

impl Stored<2> for u16 {
    fn bytes(self) -> [u8; 2] {
        self.to_le_bytes()
    }
    fn of(bytes: [u8; 2]) -> Self {
        Self::from_le_bytes(bytes)
    }
}

impl Stored<4> for f32 {
    fn bytes(self) -> [u8; 4] {
        self.to_le_bytes()
    }
    fn of(bytes: [u8; 4]) -> Self {
        Self::from_le_bytes(bytes)
    }
}

fn put_bytes<const N: usize, T: Stored<N>>(values: &[T], out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + values.len() * N, 0);
    for (to, value) in out[start..].as_chunks_mut().0.iter_mut().zip(values) {
        *to = value.bytes();
    }
}

fn get_bytes<const N: usize, T: Stored<N>>(bytes: &[u8], values: &mut [T]) {
    for (value, from) in values.iter_mut().zip(bytes.as_chunks().0) {
        *value = T::of(*from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Radix;
    use proptest::prelude::*;

    const SHAPE: KvShape = KvShape {
        layers: 2,
        kv_heads: 2,
        dim: 16,
        dtype: KvDtype::F32,
    };

    /// Writes a value that names the token and its place.
    fn append(pool: &mut Pool, seq: &mut SeqKv, tokens: &[u32]) {
        for &t in tokens {
            let pos = seq.len();
            for layer in 0..SHAPE.layers {
                let row = vec![(t * 10 + layer as u32) as f32; SHAPE.kv_heads * SHAPE.dim];
                pool.write(seq, layer, pos, &row, &row);
            }
            seq.commit(1);
        }
    }

    #[test]
    fn what_is_set_aside_takes_room_from_pages_until_it_is_given_back() {
        let block = SHAPE.block_bytes();
        let mut pool = Pool::new(SHAPE, 3 * block);
        let (mut seq, mut aside) = (SeqKv::new(SHAPE), 0);
        pool.reserve(&mut seq, PAGE_ROWS).expect("it is empty");
        let error = pool.set_aside(&mut aside, 2 * block + 1);
        assert!(matches!(error, Err(KvError::OutOfMemory { free, .. }) if free == 2 * block));
        assert_eq!((aside, pool.stats().bytes_used), (0, block));
        pool.set_aside(&mut aside, block + 1).expect("there is room");
        assert_eq!(pool.stats().bytes_used, 2 * block + 1);
        assert_eq!(pool.stats().bytes_aside, block + 1);
        assert_eq!(pool.free_bytes(), block - SHAPE.page_bytes());
        assert!(pool.reserve(&mut seq, 2 * PAGE_ROWS).is_err());
        pool.set_aside(&mut aside, block).expect("less");
        pool.reserve(&mut seq, 2 * PAGE_ROWS)
            .expect("it fits to the byte");
        assert_eq!(pool.free_bytes(), 0);
        assert!(pool.set_aside(&mut aside, block + 1).is_err());
        pool.set_aside(&mut aside, 0).expect("less");
        pool.release(seq);
        assert_eq!(pool.stats().bytes_used, 0);
    }

    fn read(pool: &Pool, seq: &SeqKv) -> Vec<u32> {
        (0..seq.len())
            .map(|pos| {
                let value = |layer, head| {
                    let id = seq.pages(layer, head)[pos / PAGE_ROWS];
                    let page = pool.page(id);
                    assert_eq!(
                        page.key(16, pos % PAGE_ROWS, 3),
                        page.value(16, pos % PAGE_ROWS, 15)
                    );
                    page.key(16, pos % PAGE_ROWS, 7) as u32
                };
                for (layer, head) in [(0, 1), (1, 0), (1, 1)] {
                    assert_eq!(value(layer, head), value(0, 0) + layer as u32);
                }
                value(0, 0) / 10
            })
            .collect()
    }

    #[test]
    fn the_accountant_refuses_before_anything_changes() {
        let mut pool = Pool::new(SHAPE, 3 * SHAPE.runs() * SHAPE.page_bytes());
        let mut seq = SeqKv::new(SHAPE);
        pool.reserve(&mut seq, 64).unwrap();
        let before = pool.stats();
        let e = pool.reserve(&mut seq, 200).unwrap_err();
        assert!(
            matches!(e, KvError::OutOfMemory { free, .. } if free == SHAPE.runs() * SHAPE.page_bytes()),
            "{e}"
        );
        assert_eq!((pool.stats(), seq.room()), (before, 64));
        pool.reserve(&mut seq, 96).unwrap();
        pool.release(seq);
        assert_eq!(pool.stats().bytes_used, 0);
    }

    #[test]
    fn a_fork_shares_full_pages_and_nobody_sees_the_others_writes() {
        let mut pool = Pool::new(SHAPE, 1 << 24);
        let mut a = SeqKv::new(SHAPE);
        pool.reserve(&mut a, 50).unwrap();
        append(&mut pool, &mut a, &(0..50).collect::<Vec<_>>());
        let mut b = pool.fork(&a).unwrap();
        assert_eq!(a.pages(0, 0)[0], b.pages(0, 0)[0]);
        assert_ne!(a.pages(0, 0)[1], b.pages(0, 0)[1]);
        pool.reserve(&mut b, 1).unwrap();
        append(&mut pool, &mut b, &[99]);
        append(&mut pool, &mut a, &[77]);
        assert_eq!(read(&pool, &a)[49..], [49, 77]);
        assert_eq!(read(&pool, &b)[49..], [49, 99]);
        pool.release(a);
        assert_eq!(read(&pool, &b).len(), 51);
        pool.release(b);
        assert_eq!(pool.stats().bytes_used, 0);
    }

    #[test]
    fn a_block_that_left_the_pool_comes_back_bit_for_bit() {
        for dtype in [KvDtype::F32, KvDtype::Bf16] {
            let shape = KvShape { dtype, ..SHAPE };
            let mut pool = Pool::new(shape, 4 * shape.block_bytes());
            let mut seq = SeqKv::new(shape);
            pool.reserve(&mut seq, 64).unwrap();
            let width = shape.kv_heads * shape.dim;
            let mut noise = 1u32;
            for layer in 0..shape.layers {
                let mut rows = || -> Vec<f32> {
                    let all_bits = (0..64 * width).map(|_| {
                        noise = noise.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
                        f32::from_bits(noise) // NaNs, infinities and subnormals among them
                    });
                    all_bits.collect()
                };
                let (k, v) = (rows(), rows());
                pool.write(&seq, layer, 0, &k, &v);
            }
            seq.commit(64);
            let (mut first, mut second, mut again) = (Vec::new(), Vec::new(), Vec::new());
            pool.export_block(&seq, 0, &mut first);
            pool.export_block(&seq, 1, &mut second);
            assert_eq!(first.len(), shape.block_bytes());
            assert_ne!(first, second);
            let mut copy = SeqKv::new(shape);
            pool.import_block(&mut copy, &first).unwrap();
            pool.import_block(&mut copy, &second).unwrap();
            assert_eq!(copy.len(), 64);
            for (block, want) in [&first, &second].into_iter().enumerate() {
                pool.export_block(&copy, block, &mut again);
                assert_eq!(&again, want);
            }
            let bits = |page: Page<'_>| -> Vec<u32> {
                match page {
                    Page::Bf16 { k, v } => k.iter().chain(v).map(|&x| x.into()).collect(),
                    Page::F32 { k, v } => k.iter().chain(v).map(|x| x.to_bits()).collect(),
                }
            };
            for (layer, head) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                for (&a, &b) in seq.pages(layer, head).iter().zip(copy.pages(layer, head)) {
                    assert_ne!(a, b);
                    assert_eq!(bits(pool.page(a)), bits(pool.page(b)));
                }
            }
            let before = (pool.stats(), copy.len(), copy.room());
            let e = pool.import_block(&mut copy, &first[1..]).unwrap_err();
            assert!(
                matches!(e, KvError::BlockBytes { got, want } if got + 1 == want),
                "{e}"
            );
            let e = pool.import_block(&mut copy, &first).unwrap_err();
            assert!(matches!(e, KvError::OutOfMemory { free: 0, .. }), "{e}");
            assert_eq!((pool.stats(), copy.len(), copy.room()), before);
            pool.release(seq);
            pool.release(copy);
            assert_eq!(pool.stats().bytes_used, 0);
        }
    }

    #[derive(Debug, Clone)]
    enum Op {
        Append(usize, usize),
        Truncate(usize, usize),
        Fork(usize),
        Release(usize),
        Insert(usize),
        Lookup(usize, usize),
        Evict,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => (0usize..6, 1usize..70).prop_map(|(s, n)| Op::Append(s, n)),
            1 => (0usize..6, 0usize..150).prop_map(|(s, n)| Op::Truncate(s, n)),
            1 => (0usize..6).prop_map(Op::Fork),
            1 => (0usize..6).prop_map(Op::Release),
            2 => (0usize..6).prop_map(Op::Insert),
            2 => (0usize..6, 0usize..150).prop_map(|(s, n)| Op::Lookup(s, n)),
            1 => Just(Op::Evict),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_sequence_of_edits_keeps_every_sequence_and_every_page(ops in prop::collection::vec(op(), 1..60)) {
            let mut pool = Pool::new(SHAPE, 40 * SHAPE.runs() * SHAPE.page_bytes());
            let mut radix = Radix::new();
            // Tokens of a sequence are a function of seed and position, so that different sequences share prefixes.
            let mut seqs: Vec<(SeqKv, Vec<u32>)> = Vec::new();
            let mut next = 0u32;
            for op in ops {
                let pick = |s: usize| s % seqs.len().max(1);
                match op {
                    Op::Append(s, n) => {
                        if seqs.len() < 4 {
                            seqs.push((SeqKv::new(SHAPE), Vec::new()));
                        }
                        let at = s % seqs.len();
                        let (kv, tokens) = &mut seqs[at];
                        let new: Vec<u32> = (0..n as u32).map(|i| {
                            let pos = tokens.len() as u32 + i;
                            if pos < 64 { pos % 5 } else { next += 1; next % 1000 }
                        }).collect();
                        if pool.reserve(kv, n).is_ok() {
                            append(&mut pool, kv, &new);
                            tokens.extend(new);
                        }
                    }
                    Op::Truncate(s, len) if !seqs.is_empty() => {
                        let at = pick(s);
                        let (kv, tokens) = &mut seqs[at];
                        pool.truncate(kv, len);
                        tokens.truncate(len);
                    }
                    Op::Fork(s) if !seqs.is_empty() => {
                        let at = pick(s);
                        if let Ok(twin) = pool.fork(&seqs[at].0) {
                            let tokens = seqs[at].1.clone();
                            seqs.push((twin, tokens));
                        }
                    }
                    Op::Release(s) if !seqs.is_empty() => {
                        let (kv, _) = seqs.remove(pick(s));
                        pool.release(kv);
                    }
                    Op::Insert(s) if !seqs.is_empty() => {
                        let (kv, tokens) = &seqs[pick(s)];
                        radix.insert(&mut pool, tokens, 7, kv);
                    }
                    Op::Lookup(s, n) if !seqs.is_empty() => {
                        let tokens = seqs[pick(s)].1.clone();
                        let tokens = &tokens[..n.min(tokens.len())];
                        prop_assert_eq!(radix.matched(tokens, 8), 0, "another salt never matches");
                        let want = radix.matched(tokens, 7);
                        let kv = radix.lookup(&mut pool, tokens, 7);
                        prop_assert_eq!(kv.len(), want);
                        seqs.push((kv, tokens[..want].to_vec()));
                    }
                    Op::Evict => radix.evict(&mut pool, 10 * SHAPE.runs() * SHAPE.page_bytes()),
                    _ => {}
                }
                for (kv, tokens) in &seqs {
                    prop_assert_eq!(&read(&pool, kv), tokens);
                }
            }
            for (kv, _) in seqs {
                pool.release(kv);
            }
            radix.clear(&mut pool);
            prop_assert_eq!(pool.stats().bytes_used, 0);
        }
    }
}
