//! A [`HookSpec`] checked against the sizes of a model: one mask a layer and a flat list of operations.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::captured::Captured;
use super::error::HookError;
use super::site::{Per, Site};
use super::spec::{
    Action, Capture, Cells, Dtype, Edit, FromRun, HookSpec, OnHit, Positions, Probe, Set, Vector,
};
use crate::readout::Reads;

/// The sizes of a model that sites depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HookShape {
    /// Layers `L`.
    pub layers: usize,
    /// Query heads `Hq`.
    pub heads: usize,
    /// Key/value heads `Hk`.
    pub kv_heads: usize,
    /// Head dimension `D`.
    pub dim: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the feed-forward part.
    pub d_ff: usize,
    /// Size of the vocabulary.
    pub vocab: usize,
}

/// Rows of other runs that edits may take values from.
#[derive(Debug, Clone, Default)]
pub struct Sources(BTreeMap<(String, Site, usize), Arc<Captured>>);

impl Sources {
    /// Makes what a run captured available.
    pub fn add(&mut self, captured: impl IntoIterator<Item = Captured>) {
        self.0.extend(
            captured
                .into_iter()
                .map(|c| ((c.id.clone(), c.site, c.layer), Arc::new(c))),
        );
    }

    fn get(&self, id: &str, site: Site, layer: usize) -> Option<&Arc<Captured>> {
        self.0.get(&(id.to_owned(), site, layer))
    }
}

/// Values of an edit, ready to use.
#[derive(Debug, Clone)]
pub(super) enum EditOp {
    Scale(f32),
    SetRow(Vec<f32>),
    SetFrom(Arc<Captured>, i64),
    AddRow(Vec<f32>),
    AddFrom(Arc<Captured>, i64, f32),
}

#[derive(Debug, Clone)]
pub(super) enum OpKind {
    Edit(EditOp),
    /// Index of the capture's slot.
    Capture(usize),
}

/// One operation at one site of one layer.
#[derive(Debug, Clone)]
pub(super) struct Op {
    pub(super) positions: Positions,
    /// Columns of the row that it concerns, ascending and disjoint.
    pub(super) columns: Vec<Range<usize>>,
    pub(super) kind: OpKind,
}

/// What a capture will be kept in.
#[derive(Debug, Clone)]
struct Slot {
    empty: Captured,
    positions: Positions,
    row_bytes: usize,
}

/// A probe with its layers and heads spelled out.
#[derive(Debug, Clone)]
pub(super) struct ProbeOp {
    pub(super) id: String,
    pub(super) layers: Vec<usize>,
    pub(super) heads: Vec<usize>,
    pub(super) positions: Positions,
    pub(super) read: Reads,
}

/// A specification that fits a model.
#[derive(Debug, Clone)]
pub struct HookPlan {
    shape: HookShape,
    /// One bit for each site, `[L + 1]`; the last is for the sites after the layers.
    mask: Vec<u32>,
    /// Where the operations of a (layer, site) are, in the order in which they run.
    index: BTreeMap<(usize, Site), Vec<Op>>,
    slots: Vec<Slot>,
    probes: Vec<ProbeOp>,
    fingerprint: u64,
    on_hit: OnHit,
}

impl HookPlan {
    /// Checks `spec` and resolves what it takes from other runs. Edits that change nothing (factor 1, alpha 0) are left out.
    ///
    /// # Errors
    /// When a layer, head, width or source does not exist or fit, or two edits contradict each other.
    pub fn compile(spec: &HookSpec, shape: HookShape, sources: &Sources) -> Result<Self, HookError> {
        let mut plan = Self {
            shape,
            mask: vec![0; shape.layers + 1],
            index: BTreeMap::new(),
            slots: Vec::new(),
            probes: Vec::new(),
            fingerprint: 0,
            on_hit: spec.on_hit,
        };
        for capture in spec.captures.iter().filter(|c| c.before_edits) {
            plan.add_capture(capture)?;
        }
        for probe in &spec.probes {
            plan.add_probe(probe)?;
        }
        let mut hash = blake3::Hasher::new();
        let mut sets: Vec<(usize, usize, &Cells)> = Vec::new();
        for (i, edit) in spec.edits.iter().enumerate() {
            plan.add_edit(i, edit, sources, &mut sets, &mut hash)?;
        }
        for capture in spec.captures.iter().filter(|c| !c.before_edits) {
            plan.add_capture(capture)?;
        }
        if hash.count() > 0 {
            plan.fingerprint = first_bytes(&hash).max(1);
        }
        Ok(plan)
    }

    /// The sizes that it was compiled for.
    pub fn shape(&self) -> &HookShape {
        &self.shape
    }

    /// Names what the edits do; 0 without any. Pages written under different fingerprints are never shared.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// The salt under which a prefix cache may share the pages of this plan with others of `salt`.
    pub fn salted(&self, salt: u64) -> u64 {
        salted(salt, self.fingerprint)
    }

    /// Whether tokens must be computed although a prefix cache has them.
    pub fn recompute(&self) -> bool {
        !(self.slots.is_empty() && self.probes.is_empty()) && self.on_hit == OnHit::Recompute
    }

    /// Whether it does nothing at all.
    pub fn is_empty(&self) -> bool {
        self.mask.iter().all(|&m| m == 0)
    }

    /// Number of tensors that its captures fill.
    pub fn tensors(&self) -> usize {
        self.slots.len()
    }

    /// Whether it asks attention anything.
    pub fn has_probes(&self) -> bool {
        !self.probes.is_empty()
    }

    /// Bytes that captures of a prompt of `prompt` tokens with `answer` more take at most.
    pub fn capture_bytes(&self, prompt: usize, answer: usize) -> usize {
        let rows = |s: &Slot| s.positions.count(prompt + answer, prompt);
        self.slots.iter().map(|s| rows(s) * s.row_bytes).sum()
    }

    /// Refuses prompts whose captures alone are over the limit of `cap` bytes.
    ///
    /// # Errors
    /// [`HookError::Cap`]
    pub fn check_cap(&self, prompt: usize, cap: usize) -> Result<(), HookError> {
        let need = self.capture_bytes(prompt, 0);
        if need > cap {
            return Err(HookError::Cap {
                tokens: prompt,
                need,
                cap,
            });
        }
        Ok(())
    }

    /// Bits of the sites that it concerns in `layer`; `L` stands for what comes after the layers.
    pub(super) fn mask(&self, layer: usize) -> u32 {
        self.mask[layer]
    }

    pub(super) fn ops(&self, layer: usize, site: Site) -> &[Op] {
        self.index.get(&(layer, site)).map_or(&[], Vec::as_slice)
    }

    pub(super) fn probes(&self) -> &[ProbeOp] {
        &self.probes
    }

    pub(super) fn empty_captures(&self) -> Vec<Captured> {
        self.slots.iter().map(|s| s.empty.clone()).collect()
    }

    fn push(&mut self, layer: usize, site: Site, op: Op) {
        self.mask[layer] |= site.bit();
        self.index.entry((layer, site)).or_default().push(op);
    }

    fn add_capture(&mut self, capture: &Capture) -> Result<(), HookError> {
        let (site, (heads, columns)) = (capture.at.site, self.columns(&capture.at)?);
        let width = columns.iter().map(Range::len).sum();
        let value = match capture.dtype {
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
        };
        for (layer, at) in self.layers(&capture.at)? {
            let empty = Captured::empty(&capture.id, site, layer, heads.clone(), width, capture.dtype);
            let same = |c: &Captured| (&c.id, c.site, c.layer) == (&empty.id, site, layer);
            if self.slots.iter().any(|s| same(&s.empty)) {
                return Err(HookError::Twice { name: empty.name() });
            }
            let op = Op {
                positions: capture.at.positions.clone(),
                columns: columns.clone(),
                kind: OpKind::Capture(self.slots.len()),
            };
            self.push(at, site, op);
            self.slots.push(Slot {
                empty,
                positions: capture.at.positions.clone(),
                row_bytes: width * value,
            });
        }
        Ok(())
    }

    fn add_probe(&mut self, probe: &Probe) -> Result<(), HookError> {
        let cells = Cells {
            site: Site::Z,
            layers: probe.layers.clone(),
            heads: probe.heads.clone(),
            positions: probe.positions.clone(),
        };
        let layers: Vec<usize> = self.layers(&cells)?.into_iter().map(|(l, _)| l).collect();
        let (heads, _) = self.columns(&cells)?;
        for &layer in &layers {
            self.mask[layer] |= Site::Z.bit();
        }
        self.probes.push(ProbeOp {
            id: probe.id.clone(),
            layers,
            heads: heads.unwrap_or_default(),
            positions: probe.positions.clone(),
            read: probe.read.clone(),
        });
        Ok(())
    }

    fn add_edit<'a>(
        &mut self,
        number: usize,
        edit: &'a Edit,
        sources: &Sources,
        sets: &mut Vec<(usize, usize, &'a Cells)>,
        hash: &mut blake3::Hasher,
    ) -> Result<(), HookError> {
        let (site, (_, columns)) = (edit.at.site, self.columns(&edit.at)?);
        let layers = self.layers(&edit.at)?;
        let width: usize = columns.iter().map(Range::len).sum();
        check_values(site, &edit.action, width)?;
        if changes_nothing(&edit.action) {
            return Ok(());
        }
        // JSON of a specification is one text for one meaning: fields have a fixed order, floats their shortest form.
        hash.update(&serde_json::to_vec(edit).unwrap_or_default());
        for (layer, at) in layers {
            let source = |from: &FromRun| source(from, site, layer, width, sources);
            let op = match &edit.action {
                Action::Scale(factor) => EditOp::Scale(*factor),
                Action::Set(Set::Zero) => EditOp::SetRow(vec![0.0; width]),
                Action::Set(Set::Mean(row)) => EditOp::SetRow(row.clone()),
                Action::Set(Set::From(from)) => EditOp::SetFrom(source(from)?, from.shift),
                Action::Add(add) => match &add.what {
                    Vector::Row(row) => EditOp::AddRow(row.iter().map(|x| x * add.alpha).collect()),
                    Vector::From(from) => EditOp::AddFrom(source(from)?, from.shift, add.alpha),
                },
            };
            if let EditOp::SetFrom(rows, _) | EditOp::AddFrom(rows, ..) = &op {
                for (pos, row) in rows.positions.iter().zip(rows.to_f32().chunks(width.max(1))) {
                    hash.update(&pos.to_le_bytes());
                    row.iter().for_each(|x| {
                        hash.update(&x.to_le_bytes());
                    });
                }
            }
            if matches!(op, EditOp::SetRow(_) | EditOp::SetFrom(..)) {
                let same = |other: &&(usize, usize, &Cells)| other.1 == at && overlap(other.2, &edit.at);
                if let Some(&(first, ..)) = sets.iter().find(same) {
                    return Err(HookError::Conflict {
                        first,
                        second: number,
                        name: site.full_name(layer),
                    });
                }
                sets.push((number, at, &edit.at));
            }
            let op = Op {
                positions: edit.at.positions.clone(),
                columns: columns.clone(),
                kind: OpKind::Edit(op),
            };
            self.push(at, site, op);
        }
        Ok(())
    }

    /// (layer, its index in the mask) of the cells.
    fn layers(&self, cells: &Cells) -> Result<Vec<(usize, usize)>, HookError> {
        let (site, layers) = (cells.site, self.shape.layers);
        match (site.per(), &cells.layers) {
            (Per::Start, None) => Ok(vec![(0, 0)]),
            (Per::End, None) => Ok(vec![(0, layers)]),
            (Per::Start | Per::End, Some(_)) => Err(HookError::NoLayers { site }),
            (Per::Layer, None) => Ok((0..layers).map(|l| (l, l)).collect()),
            (Per::Layer, Some(asked)) => {
                let mut asked = asked.clone();
                asked.sort_unstable();
                asked.dedup();
                match asked.iter().find(|&&l| l >= layers) {
                    Some(&layer) => Err(HookError::Layer { site, layer, layers }),
                    None => Ok(asked.into_iter().map(|l| (l, l)).collect()),
                }
            }
        }
    }

    /// The heads of the cells, if the site has heads, and their columns.
    fn columns(&self, cells: &Cells) -> Result<(Option<Vec<usize>>, Vec<Range<usize>>), HookError> {
        let site = cells.site;
        let Some(heads) = site.heads(&self.shape) else {
            return match cells.heads {
                Some(_) => Err(HookError::NoHeads { site }),
                None => Ok((None, std::iter::once(0..site.width(&self.shape)).collect())),
            };
        };
        let mut asked = cells.heads.clone().unwrap_or_else(|| (0..heads).collect());
        asked.sort_unstable();
        asked.dedup();
        if let Some(&head) = asked.iter().find(|&&h| h >= heads) {
            return Err(HookError::Head { site, head, heads });
        }
        let dim = self.shape.dim;
        let columns = asked.iter().map(|h| h * dim..(h + 1) * dim).collect();
        Ok((Some(asked), columns))
    }
}

/// The rows that `from` names, if they have the width of the edited cells.
fn source(
    from: &FromRun,
    site: Site,
    layer: usize,
    width: usize,
    sources: &Sources,
) -> Result<Arc<Captured>, HookError> {
    let (capture, name) = (from.capture.clone(), site.full_name(layer));
    let Some(found) = sources.get(&capture, site, layer) else {
        return Err(HookError::Source { capture, name });
    };
    if found.width != width {
        let (got, want) = (found.width, width);
        return Err(HookError::SourceWidth {
            capture,
            name,
            got,
            want,
        });
    }
    Ok(Arc::clone(found))
}

/// The salt of pages that are written under `fingerprint` by a request of `salt`.
pub(super) fn salted(salt: u64, fingerprint: u64) -> u64 {
    if fingerprint == 0 {
        return salt;
    }
    let mut hash = blake3::Hasher::new();
    hash.update(&salt.to_le_bytes())
        .update(&fingerprint.to_le_bytes());
    first_bytes(&hash)
}

/// A number that names `bytes`, the same in every process and version: for [`super::Hook::fingerprint`].
pub fn fingerprint(bytes: &[u8]) -> u64 {
    let mut hash = blake3::Hasher::new();
    hash.update(bytes);
    first_bytes(&hash)
}

fn first_bytes(hash: &blake3::Hasher) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&hash.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

fn changes_nothing(action: &Action) -> bool {
    match action {
        Action::Scale(factor) => *factor == 1.0,
        Action::Add(add) => add.alpha == 0.0,
        Action::Set(_) => false,
    }
}

fn check_values(site: Site, action: &Action, want: usize) -> Result<(), HookError> {
    let (row, factor): (&[f32], f32) = match action {
        Action::Scale(factor) => (&[], *factor),
        Action::Set(Set::Mean(row)) => (row, 1.0),
        Action::Set(Set::Zero | Set::From(_)) => return Ok(()),
        Action::Add(add) => match &add.what {
            Vector::Row(row) => (row, add.alpha),
            Vector::From(_) => (&[], add.alpha),
        },
    };
    if !factor.is_finite() || row.iter().any(|x| !x.is_finite()) {
        return Err(HookError::NotFinite { site });
    }
    let has_row = matches!(
        action,
        Action::Set(Set::Mean(_))
            | Action::Add(super::spec::Add {
                what: Vector::Row(_),
                ..
            })
    );
    if has_row && row.len() != want {
        let got = row.len();
        return Err(HookError::Width { site, got, want });
    }
    Ok(())
}

/// Whether two sets of cells of one layer have values in common. Positions that depend on the prompt count as overlapping.
fn overlap(a: &Cells, b: &Cells) -> bool {
    let heads = match (&a.heads, &b.heads) {
        (Some(a), Some(b)) => a.iter().any(|h| b.contains(h)),
        _ => true,
    };
    let positions = match (&a.positions, &b.positions) {
        (Positions::Range(a, b), Positions::Range(c, d)) => a.max(c) < b.min(d),
        (Positions::List(list), Positions::Range(from, to))
        | (Positions::Range(from, to), Positions::List(list)) => list.iter().any(|p| (from..to).contains(&p)),
        (Positions::List(a), Positions::List(b)) => a.iter().any(|p| b.contains(p)),
        _ => true,
    };
    a.site == b.site && heads && positions
}
