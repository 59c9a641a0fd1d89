//! The dashboard: one HTML file that needs nothing else, with the cards of features in it.

use serde::Serialize;

use super::features::Card;

/// What stands at the head of a page.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct About {
    /// Name of the model.
    pub model: String,
    /// Layer.
    pub layer: usize,
    /// Architecture of the dictionary.
    pub architecture: String,
    /// Features in all.
    pub features: usize,
    /// Tokens that were looked at.
    pub tokens: usize,
    /// Mean number of active features of a token.
    pub l0: f64,
    /// Shares of the features by firing rate: 24 quarters of a power of ten from 1e-6 to 1.
    pub densities: Vec<f64>,
    /// Share of the features that never fired.
    pub silent: f64,
}

/// The page.
///
/// # Errors
/// Never, as long as the cards can be written as JSON.
pub fn page(about: &About, cards: &[Card]) -> serde_json::Result<String> {
    let data = serde_json::to_string(&serde_json::json!({ "about": about, "cards": cards }))?;
    // Text of the corpus must not end the script element.
    let data = data.replace('<', "\\u003c");
    Ok(include_str!("page.html").replacen("__DATA__", &data, 1))
}

#[cfg(test)]
mod tests {
    use super::super::features::{Card, Example};
    use super::*;

    #[test]
    fn texts_of_a_page_cannot_end_its_data() {
        let about = About {
            model: "m".into(),
            layer: 3,
            architecture: "jumprelu".into(),
            features: 10,
            tokens: 100,
            l0: 2.5,
            densities: vec![0.1; 24],
            silent: 0.0,
        };
        let card = Card {
            feature: 7,
            rate: 0.01,
            max: 2.0,
            heads: vec![0.5, 0.5],
            raises: vec![("</script><b>".into(), 1.0)],
            lowers: Vec::new(),
            top: vec![Example {
                tokens: vec!["__DATA__".into(), "<!--".into()],
                values: vec![0.0, 2.0],
                at: 1,
                place: (0, 9),
                sources: None,
            }],
            intervals: Vec::new(),
        };
        let page = page(&about, &[card]).unwrap();
        assert_eq!(
            page.matches("</script>").count(),
            2,
            "that of the data and that of the program"
        );
        assert!(!page.contains("<!--") && page.contains("__DATA__"));
        let start = page.find("type=\"application/json\">").unwrap() + "type=\"application/json\">".len();
        let data = &page[start..start + page[start..].find("</script>").unwrap()];
        let data: serde_json::Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["cards"][0]["raises"][0][0], "</script><b>");
        assert!(
            !page.contains("http://") && !page.contains("https://"),
            "no network"
        );
    }
}
