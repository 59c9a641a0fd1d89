use super::*;
use crate::segment::Kind;
use crate::{KvDtype, KvShape, SeqKv};

const SHAPE: KvShape = KvShape {
    layers: 2,
    kv_heads: 2,
    dim: 16,
    dtype: KvDtype::Bf16,
};

fn model(name: u8) -> Fingerprint {
    Fingerprint([name; 32])
}

/// A chunk of `tokens` behind `prefix`, whose rows are made from the tokens.
fn chunk(pool: &mut Pool, prefix: &[u32], tokens: &[u32]) -> Arc<Segment> {
    let mut seq = SeqKv::new(SHAPE);
    pool.reserve(&mut seq, tokens.len()).unwrap();
    for layer in 0..SHAPE.layers {
        let value = |(t, i): (u32, u32)| (t * 32 + i) as f32 * 0.01 + layer as f32;
        let cells = tokens.iter().flat_map(|&t| (0..32).map(move |i| (t, i)));
        let k: Vec<f32> = cells.map(value).collect();
        pool.write(&seq, layer, 0, &k, &k);
    }
    seq.commit(tokens.len());
    Segment::of_tail(pool, seq, prefix.len() as u32, tokens.to_vec(), Kind::Exact)
}

fn put(store: &mut ChunkStore, pool: &mut Pool, prefix: &[u32], tokens: &[u32]) -> ChunkKey {
    let key = store.key("alone", 0, ChunkText { prefix, tokens });
    let segment = chunk(pool, prefix, tokens);
    store.insert(pool, key, prefix, segment);
    key
}

fn bytes(pool: &Pool, segment: &Segment) -> Vec<u8> {
    let mut out = Vec::new();
    for at in 0..SHAPE.runs() {
        let run = segment.run(at / 2, at % 2);
        run.page_ids()
            .iter()
            .for_each(|&id| pool.export_page(id, &mut out));
    }
    out
}

#[test]
fn a_chunk_is_found_by_its_prefix_and_tokens_and_by_nothing_less() {
    let mut pool = Pool::new(SHAPE, 1 << 20);
    let mut store = ChunkStore::new(model(1), None);
    let key = put(&mut store, &mut pool, &[1, 2], &[3, 4, 5]);
    let text = |prefix, tokens| ChunkText { prefix, tokens };
    let hit = store.get(&mut pool, key, text(&[1, 2], &[3, 4, 5])).unwrap();
    hit.release(&mut pool);
    // The same name with other tokens: as if two hashes were the same.
    assert!(store.get(&mut pool, key, text(&[1, 2], &[3, 4, 6])).is_none());
    assert!(store.get(&mut pool, key, text(&[1, 3], &[3, 4, 5])).is_none());
    let others = [
        store.key("alone", 1, text(&[1, 2], &[3, 4, 5])),
        store.key("other", 0, text(&[1, 2], &[3, 4, 5])),
        store.key("alone", 0, text(&[1], &[2, 3, 4, 5])),
        ChunkStore::new(model(2), None).key("alone", 0, text(&[1, 2], &[3, 4, 5])),
    ];
    for other in others {
        assert_ne!(other, key);
    }
    let stats = store.stats(&pool);
    assert_eq!((stats.chunks, stats.hits, stats.misses), (1, 1, 2));
    assert_eq!(stats.bytes, pool.stats().bytes_used);
    store.clear(&mut pool);
    assert_eq!(pool.stats().bytes_used, 0);
}

#[test]
fn the_least_recently_used_chunk_goes_first_and_one_that_is_read_stays() {
    let mut pool = Pool::new(SHAPE, 3 * SHAPE.block_bytes());
    let mut store = ChunkStore::new(model(1), None);
    let keys: Vec<ChunkKey> = (0..3)
        .map(|i| put(&mut store, &mut pool, &[9], &[i; 20]))
        .collect();
    let text = |tokens| ChunkText { prefix: &[9], tokens };
    let reader = store.get(&mut pool, keys[1], text(&[1; 20])).unwrap();
    let again = store.get(&mut pool, keys[0], text(&[0; 20])).unwrap();
    again.release(&mut pool);
    assert!(store.evict(&mut pool, SHAPE.block_bytes()));
    let left: Vec<bool> = keys.iter().map(|&k| store.contains(k)).collect();
    assert_eq!(left, [true, true, false], "chunk 2 was used before the others");
    assert!(
        !store.evict(&mut pool, 3 * SHAPE.block_bytes()),
        "chunk 1 has a reader"
    );
    assert_eq!(store.stats(&pool).chunks, 1);
    reader.release(&mut pool);
    assert!(store.evict(&mut pool, 3 * SHAPE.block_bytes()));
    assert_eq!(pool.stats().bytes_used, 0);
}

#[test]
fn a_chunk_comes_back_from_disk_bit_for_bit_and_damage_is_a_miss() {
    let dir = tempfile::tempdir().unwrap();
    let (prefix, tokens): (Vec<u32>, Vec<u32>) = ((0..5).collect(), (100..170).collect());
    let text = ChunkText {
        prefix: &prefix,
        tokens: &tokens,
    };
    let mut pool = Pool::new(SHAPE, 1 << 20);
    let mut store = ChunkStore::new(model(1), Some(dir.path().into()));
    let key = put(&mut store, &mut pool, &prefix, &tokens);
    store.flush(&pool).unwrap();
    let segment = store.get(&mut pool, key, text).unwrap();
    let want = bytes(&pool, &segment);
    segment.release(&mut pool);

    let mut fresh = ChunkStore::new(model(1), Some(dir.path().into()));
    let loaded = fresh.get(&mut pool, key, text).unwrap();
    // Rows behind the last one of the last page mean nothing, but they were copied as well.
    assert_eq!(bytes(&pool, &loaded), want);
    assert_eq!((loaded.tokens(), loaded.end()), (&tokens[..], 75));
    loaded.release(&mut pool);
    assert_eq!(fresh.stats(&pool).loaded, 1);

    let mut other = ChunkStore::new(model(2), Some(dir.path().into()));
    assert!(other.get(&mut pool, key, text).is_none(), "another model's");
    let file = std::fs::read_dir(dir.path())
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let whole = std::fs::read(&file).unwrap();
    for at in [0, 9, 20, 60, 80, 100, 200, 5000, whole.len() - 1] {
        let mut bad = whole.clone();
        bad[at] ^= 4;
        std::fs::write(&file, bad).unwrap();
        let mut fresh = ChunkStore::new(model(1), Some(dir.path().into()));
        assert!(fresh.get(&mut pool, key, text).is_none(), "byte {at} is wrong");
    }
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let mut fresh = ChunkStore::new(model(1), Some(dir.path().into()));
    assert!(fresh.get(&mut pool, key, text).is_none());
    store.clear(&mut pool);
    assert_eq!(
        pool.stats().bytes_used,
        SHAPE.block_bytes() * 3,
        "the loaded chunk that its store still holds"
    );
}
