"""PadChest's 193 words, and the finding to which each belongs.

The findings are ChestX-ray14's, under its names, and others that are frequent or that other archives have too. Words
are compared by `label_rows.word_key`. Some words that contain a finding's name are something else: an effusion around
the heart, air below the skin, a pseudonodule, masses outside of the lungs and the pleura, and what tuberculosis left.
"""

from __future__ import annotations

from cxr import schema
from cxr.sources.label_rows import word_key

_WORDS_BY_FINDING = {
    "Atelectasis": "atelectasis; atelectasis basal; laminar atelectasis; lobar atelectasis; round atelectasis; "
    "segmental atelectasis; total atelectasis",
    "Cardiomegaly": "cardiomegaly",
    "Effusion": "pleural effusion; loculated pleural effusion; loculated fissural effusion",
    "Infiltration": "infiltrates; interstitial pattern; ground glass pattern; reticular interstitial pattern; "
    "reticulonodular interstitial pattern; alveolar pattern; consolidation; air bronchogram",
    "Mass": "mass; pulmonary mass; pleural mass",
    "Nodule": "nodule; multiple nodules",
    "Pneumonia": "pneumonia; atypical pneumonia",
    "Pneumothorax": "pneumothorax; hydropneumothorax",
    "Consolidation": "consolidation; air bronchogram",
    "Edema": "pulmonary edema",
    "Emphysema": "emphysema",
    "Fibrosis": "pulmonary fibrosis",
    "Pleural_Thickening": "pleural thickening; apical pleural thickening; calcified pleural thickening",
    "Hernia": "hiatal hernia",
    "Air Trapping": "air trapping",
    "Aortic Atheromatosis": "aortic atheromatosis",
    "Aortic Elongation": "aortic elongation; ascendent aortic elongation; descendent aortic elongation; supra "
    "aortic elongation",
    "Bronchiectasis": "bronchiectasis",
    "COPD": "COPD signs",
    "Costophrenic Angle Blunting": "costophrenic angle blunting",
    "Flattened Diaphragm": "flattened diaphragm",
    "Fracture": "fracture; rib fracture; callus rib fracture; clavicle fracture; humeral fracture; vertebral "
    "fracture",
    "Granuloma": "granuloma; calcified granuloma",
    "Hemidiaphragm Elevation": "hemidiaphragm elevation",
    "Hilar Enlargement": "hilar enlargement; vascular hilar enlargement; adenopathy; calcified adenopathy; "
    "calcified mediastinal adenopathy; pulmonary artery enlargement",
    "Scoliosis": "scoliosis",
    "Support Devices": "pacemaker; single chamber device; dual chamber device; electrical device; dai; NSG tube; "
    "endotracheal tube; tracheostomy tube; chest drain tube; gastrostomy tube; nephrostomy tube; "
    "ventriculoperitoneal drain tube; double J stent; catheter; central venous catheter; central venous catheter "
    "via jugular vein; central venous catheter via subclavian vein; central venous catheter via umbilical vein; "
    "reservoir central venous catheter; artificial heart valve; artificial aortic heart valve; artificial mitral "
    "heart valve; aortic endoprosthesis",
    "Tube": "NSG tube; endotracheal tube; tracheostomy tube; chest drain tube; gastrostomy tube; nephrostomy tube; "
    "ventriculoperitoneal drain tube; double J stent",
    "Tuberculosis": "tuberculosis",
}
FINDINGS = tuple(_WORDS_BY_FINDING)
assert FINDINGS[: len(schema.FINDINGS)] == schema.FINDINGS

WORDS: dict[str, tuple[str, ...]] = {
    word_key(word): tuple(finding for finding, others in _WORDS_BY_FINDING.items() if word in others.split("; "))
    for words in _WORDS_BY_FINDING.values()
    for word in words.split("; ")
}
"""The findings of a word, by its `word_key`."""

NORMAL = word_key("normal")
EXCLUDED = word_key("exclude")
UNINFORMATIVE = frozenset(map(word_key, ("unchanged", "suboptimal study")))
"""Words that say nothing of the image's findings."""

_OTHERS = (
    "abnormal foreign body; abscess; air fluid level; aortic aneurysm; aortic button enlargement; asbestosis signs; "
    "axial hyperostosis; azygoesophageal recess shift; azygos lobe; blastic bone lesion; bone cement; bone "
    "metastasis; breast mass; bronchovascular markings; bullas; calcified densities; calcified fibroadenoma; "
    "calcified pleural plaques; cavitation; central vascular redistribution; cervical rib; Chilaiditi sign; chronic "
    "changes; costochondral junction hypertrophy; cyst; dextrocardia; diaphragmatic eventration; empyema; end on "
    "vessel; endoprosthesis; esophagic dilatation; external foreign body; fibrotic band; fissure thickening; "
    "goiter; gynecomastia; heart insufficiency; heart valve calcified; hilar congestion; humeral prosthesis; "
    "hyperinflated lung; hypoexpansion; hypoexpansion basal; increased density; kerley lines; kyphosis; lepidic "
    "adenocarcinoma; lipomatosis; lung metastasis; lung vascular paucity; lymphangitis carcinomatosa; lytic bone "
    "lesion; major fissure thickening; mammary prosthesis; mastectomy; mediastinal enlargement; mediastinal mass; "
    "mediastinal shift; mediastinic lipomatosis; metal; miliary opacities; minor fissure thickening; nipple shadow; "
    "non axial articular degenerative changes; obesity; osteopenia; osteoporosis; osteosynthesis material; pectum "
    "carinatum; pectum excavatum; pericardial effusion; pleural plaques; pneumomediastinum; pneumoperitoneo; post "
    "radiotherapy changes; prosthesis; pseudonodule; pulmonary artery hypertension; pulmonary hypertension; "
    "pulmonary venous hypertension; respiratory distress; right sided aortic arch; sclerotic bone lesion; soft "
    "tissue mass; sternoclavicular junction hypertrophy; sternotomy; subacromial space narrowing; subcutaneous "
    "emphysema; superior mediastinal enlargement; surgery; surgery breast; surgery heart; surgery humeral; surgery "
    "lung; surgery neck; suture material; thoracic cage deformation; tracheal shift; tuberculosis sequelae; "
    "vascular redistribution; vertebral anterior compression; vertebral compression; vertebral degenerative "
    "changes; volume loss"
)
WITHOUT_FINDING = {word_key(word): word for word in _OTHERS.split("; ")}
"""The other words, which belong to none of `FINDINGS`, by `word_key`."""
