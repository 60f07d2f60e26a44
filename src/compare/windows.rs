//! Which tokens are run, and at which positions predictions are scored.

use crate::convert::host::Model;
use anyhow::{ensure, Context, Result};
use std::path::Path;

/// Tokens of the passage that a recall window repeats.
pub const PASSAGE: usize = 256;
/// Fewest tokens between a passage's end and its repeat.
pub const FAR: usize = 1000;
/// In a chunk's first half, which counts for no figure, every so many positions are scored for the plot along the position.
const SPARSE: usize = 8;
/// Tokenized first, per token wanted; doubled until it is enough.
const BYTES_PER_TOKEN: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Consecutive text; the second half counts, as in `llama-perplexity`.
    Chunk,
    /// A passage, the text after it, and the passage again.
    Recall,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Chunk => "chunk",
            Kind::Recall => "recall",
        }
    }
}

#[derive(Clone, Debug)]
pub struct Window {
    pub tokens: Vec<i32>,
    /// ascending; position p predicts token p + 1
    pub scored: Vec<usize>,
}

/// How a text is cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cut {
    /// tokens that the text was seen to have, at least what the windows need
    pub n_token: usize,
    /// tokens of a chunk
    pub chunk: usize,
    pub n_chunk: usize,
    /// tokens between a passage and its repeat
    pub gap: usize,
    pub n_recall: usize,
}

/// Positions of a chunk from which on predictions count.
pub fn first_counted(chunk: usize) -> usize {
    chunk / 2
}

/// Positions that a chunk is scored at.
pub fn chunk_positions(chunk: usize) -> Vec<usize> {
    let first = first_counted(chunk);
    (0..first).step_by(SPARSE).chain(first..chunk - 1).collect()
}

/// Positions that predict the passage's tokens after its first one: where it stands first, and where it is repeated.
pub fn recall_positions(n_bos: usize, gap: usize) -> Vec<usize> {
    let again = n_bos + PASSAGE + gap;
    (n_bos..n_bos + PASSAGE - 1).chain(again..again + PASSAGE - 1).collect()
}

pub fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read text {}", path.display()))?;
    ensure!(!bytes.is_empty(), "text {} is empty", path.display());
    String::from_utf8(bytes).map_err(|e| {
        anyhow::anyhow!("text {} is not UTF-8 at byte {}", path.display(), e.utf8_error().valid_up_to())
    })
}

/// The first `n` tokens of a text or a few more, or all that it has; the model's first token, if it has one, stands before them.
pub fn tokenize(model: &Model, text: &str, n: usize) -> Result<Vec<i32>> {
    let mut size = n * BYTES_PER_TOKEN;
    loop {
        let mut end = size.min(text.len());
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let tokens = model.tokenize(&text[..end])?;
        // the last tokens of a cut text could be others than the whole text's
        let sure = if end < text.len() { tokens.len().saturating_sub(64) } else { tokens.len() };
        if sure >= n || end == text.len() {
            let bad = tokens[..sure].iter().any(|&t| t < 0 || t as usize >= model.n_vocab);
            ensure!(!bad, "the runtime's tokenizer gave a token outside the vocabulary");
            return Ok(model.token_bos.into_iter().chain(tokens[..sure].iter().copied()).collect());
        }
        size *= 2;
    }
}

/// Tokens that `n_chunk` chunks and `n_recall` recall windows need at most.
pub fn needed(n_ctx: usize, n_chunk: usize, n_recall: usize) -> usize {
    n_ctx * n_chunk.max(n_recall)
}

impl Cut {
    /// `n_token` counts the token that the model begins with. `whole`: a text shorter than one chunk becomes a shorter chunk.
    pub fn new(n_token: usize, n_bos: usize, n_ctx: usize, n_chunk: usize, n_recall: usize, whole: bool) -> Option<Self> {
        let chunk = if whole { n_ctx.min(n_token) } else { n_ctx };
        let n_chunk = n_chunk.min(n_token.checked_div(chunk)?);
        let gap = n_ctx.saturating_sub(n_bos + 2 * PASSAGE);
        let n_recall = if gap < FAR { 0 } else { n_recall.min((n_token - n_bos) / (PASSAGE + gap)) };
        (n_chunk > 0 && chunk >= 4).then_some(Self { n_token, chunk, n_chunk, gap, n_recall })
    }

    pub fn positions(&self, kind: Kind, n_bos: usize) -> Vec<usize> {
        match kind {
            Kind::Chunk => chunk_positions(self.chunk),
            Kind::Recall => recall_positions(n_bos, self.gap),
        }
    }

    pub fn n_window(&self, kind: Kind) -> usize {
        match kind {
            Kind::Chunk => self.n_chunk,
            Kind::Recall => self.n_recall,
        }
    }

    /// Tokens of a window.
    pub fn length(&self, kind: Kind, n_bos: usize) -> usize {
        match kind {
            Kind::Chunk => self.chunk,
            Kind::Recall => n_bos + 2 * PASSAGE + self.gap,
        }
    }

    /// Window `i`; `tokens` as [`tokenize`] gives them.
    pub fn window(&self, kind: Kind, i: usize, tokens: &[i32], bos: Option<i32>) -> Window {
        let n_bos = usize::from(bos.is_some());
        let tokens = match kind {
            Kind::Chunk => {
                let mut tokens = tokens[i * self.chunk..][..self.chunk].to_vec();
                // as llama-perplexity does: every chunk begins as a text does, at the cost of its first token
                if let Some(bos) = bos {
                    tokens[0] = bos;
                }
                tokens
            }
            Kind::Recall => {
                let stretch = &tokens[n_bos + i * (PASSAGE + self.gap)..][..PASSAGE + self.gap];
                bos.into_iter().chain(stretch.iter().copied()).chain(stretch[..PASSAGE].iter().copied()).collect()
            }
        };
        Window { tokens, scored: self.positions(kind, n_bos) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_and_recall_windows() {
        let tokens: Vec<i32> = (0..9000).map(|t| t % 5000).collect();
        let cut = Cut::new(9000, 1, 2048, 8, 8, false).unwrap();
        assert_eq!(cut, Cut { n_token: 9000, chunk: 2048, n_chunk: 4, gap: 1535, n_recall: 5 });
        let chunk = cut.window(Kind::Chunk, 1, &tokens, Some(7));
        assert_eq!((chunk.tokens.len(), chunk.tokens[0], chunk.tokens[1]), (2048, 7, 2049));
        assert_eq!(chunk.scored.iter().filter(|&&p| p >= 1024).count(), 1023);
        assert_eq!(chunk.scored.last(), Some(&2046));
        let recall = cut.window(Kind::Recall, 4, &tokens, Some(7));
        assert_eq!(recall.tokens.len(), 2048);
        let half = recall.scored.len() / 2;
        assert_eq!(half, PASSAGE - 1);
        for (&p, &again) in recall.scored[..half].iter().zip(&recall.scored[half..]) {
            assert_eq!(recall.tokens[p..=p + 1], recall.tokens[again..=again + 1]);
            assert!(again - p >= FAR + PASSAGE);
        }
    }

    #[test]
    fn short_texts() {
        assert_eq!(Cut::new(2047, 1, 2048, 8, 8, false), None);
        let short = Cut::new(1500, 1, 2048, 8, 8, true).unwrap();
        assert_eq!((short.chunk, short.n_chunk, short.n_recall), (1500, 1, 0));
        assert_eq!(Cut::new(100_000, 1, 512, 8, 8, false).unwrap().n_recall, 0, "nothing is far in a short context");
        assert_eq!(Cut::new(0, 0, 2048, 8, 8, true), None);
    }
}
